"""What a worker process does all day: answer frames, step the engine, send its tokens.

One loop. It sleeps in `poll` when there is nothing to do, looks for frames without waiting between
two steps, and uses idle time to prepare for models that may come. Beside it the link's receiving
thread hands new sequences to the engine at once, so that a request does not wait for the end of a
step to be queued, and opens the gates at which a step may wait (`_accept`).
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

from flashserve.errors import (
    FlashServeError,
    InputError,
    InternalError,
    ReplicaError,
    SelfCheckError,
    error_from_code,
)
from flashserve.messages import wire
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, Frame, Item, Notice, Reply
from flashserve.messages.work import (
    AdapterImage,
    ArrivalFailed,
    DescribeModel,
    DropAdapter,
    GenerateJob,
    LoadModel,
    ModelLost,
    Opened,
    Prepare,
    TokenBatch,
    UnloadReport,
    WorkerReady,
    WorkerStats,
)
from flashserve.node.host import BatchingEngine, Host
from flashserve.node.link import Link
from flashserve.types import AdapterId, KVUsage, TokenOutput

_log = logging.getLogger(__name__)


class EngineUnusableError(Exception):
    """The engine, or the device, could not be brought back to an empty state."""


@dataclasses.dataclass(slots=True)
class _Stream:
    call_id: int
    sequence_id: str
    added_at: float | None
    waited_s: float
    """What the engine had waited for weights when it was added; then what it waited since."""
    num_reused: int | None = None
    """None before the first token."""
    credit: int = wire.INITIAL_CREDIT
    pending: list[TokenOutput] = dataclasses.field(default_factory=list)
    finished: bool = False


class Serving:
    """The loop of one worker over its link to the agent."""

    def __init__(self, link: Link, host: Host, ready: WorkerReady) -> None:
        self._link = link
        self._host = host
        self._ready = ready
        self._streams: dict[int, _Stream] = {}
        self._sequences: dict[str, _Stream] = {}
        self._refused: dict[int, Fault] = {}
        """Calls that `_accept` could not carry out; the loop, which alone sends, answers."""
        self._lock = threading.Lock()
        """Held while the engine is made, emptied or freed, and while a sequence is added."""
        self._arrival_error: FlashServeError | None = None
        """Why bytes of the loaded model will never come."""
        self._may_work_ahead = False

    def run(self) -> None:
        """Serves until the agent closes the connection.

        Raises:
            ConnectionError: the agent is gone.
            EngineUnusableError: see there; the process should end.
            WireError: the agent sent something that is no frame.
        """
        self._link.send(Notice("ready", wire.pack(self._ready)))
        self._link.listen(self._accept, self._closed)
        while True:
            for frame in self._link.poll(self._patience_s()):
                self._handle(frame)
            engine = self._host.engine
            if engine is not None and engine.has_work:
                self._step(engine)
            elif engine is None and self._may_work_ahead:
                self._may_work_ahead = self._host.work_ahead()

    def _patience_s(self) -> float | None:
        engine = self._host.engine
        busy = self._may_work_ahead if engine is None else engine.has_work
        return 0.0 if busy else None

    def _handle(self, frame: Frame) -> None:
        match frame:
            case Call(call_id, "generate"):
                if refusal := self._refused.pop(call_id, None):
                    self._link.send(refusal)
            case Call(call_id, "drop"):
                self._link.send(self._refused.pop(call_id, Reply(call_id, wire.pack(None))))
            case Call():
                self._call(frame)
            case Credit(call_id, num_items):
                if stream := self._streams.get(call_id):
                    stream.credit += num_items
                    self._send_tokens(stream)
            case Cancel(call_id):
                if stream := self._streams.get(call_id):
                    with self._lock:
                        self._abort(stream)
                    self._link.send(End(call_id))
            case Notice("prepare", body):
                self._host.prepare(wire.unpack(body, Prepare))
                self._may_work_ahead = True
            case Notice("opened" | "failed" | "adapter" | "prefetch"):
                pass  # `_accept` has dealt with it
            case _:
                _log.warning("unexpected frame %s", type(frame).__name__)

    def _accept(self, frame: Frame) -> None:
        """What cannot wait for the end of a step; on the receiving thread, also during one.

        Queues a new sequence, learns and forgets adapters in the order of the frames, and lets go
        on, or end, a step that waits for weights.
        """
        match frame:
            case Call(call_id, "generate", body):
                try:
                    with self._lock:
                        self._generate(call_id, wire.unpack(body, GenerateJob))
                except Exception as error:
                    self._refused[call_id] = _fault(frame, error)
            case Call(call_id, "drop", body):
                try:
                    self._drop_adapter(wire.unpack(body, DropAdapter))
                except Exception as error:
                    self._refused[call_id] = _fault(frame, error)
            case Notice("adapter", body):
                with self._lock:
                    self._put_adapter(wire.unpack(body, AdapterImage))
            case Notice("prefetch", body):
                self._prefetch_adapter(AdapterId(wire.unpack(body, str)))
            case Call(method="unload"):
                self._host.fail_arrival(ReplicaError("the replica was stopped"))
            case Notice("opened", body):
                self._host.opened(wire.unpack(body, Opened))
            case Notice("failed", body):
                failed = wire.unpack(body, ArrivalFailed)
                self._arrival_error = error_from_code(failed.code, failed.message)
                self._host.fail_arrival(self._arrival_error)

    def _closed(self) -> None:
        """The connection has ended; the loop hears of it from `poll`, after its step."""
        self._host.fail_arrival(ReplicaError("the agent is gone"))

    def _call(self, call: Call) -> None:
        """Answers a call; whatever goes wrong in it becomes its Fault."""
        try:
            self._link.send(Reply(call.id, wire.pack(self._answer(call.method, call.body))))
        except Exception as error:
            self._link.send(_fault(call, error))

    def _answer(self, method: str, body: Any) -> object:
        match method:
            case "load":
                with self._lock:
                    return self._host.load(wire.unpack(body, LoadModel))
            case "unload":
                return self._unload()
            case "describe":
                return self._host.describe(wire.unpack(body, DescribeModel))
            case "stats":
                return self._stats()
            case _:
                raise InputError(f"a worker has no method {method}")

    def _generate(self, call_id: int, job: GenerateJob) -> None:
        engine = self._host.engine
        if engine is None:
            raise ReplicaError("the worker holds no model")
        if job.sequence_id in self._sequences:
            raise InputError(f"sequence {job.sequence_id} is already running")
        stream = _Stream(call_id, job.sequence_id, time.monotonic(), engine.waited_s)
        self._streams[call_id] = stream
        self._sequences[job.sequence_id] = stream
        try:
            engine.add(job)
        except BaseException:
            self._forget(stream)
            raise

    def _put_adapter(self, image: AdapterImage) -> None:
        if (engine := self._host.engine) is not None:
            engine.put_adapter(image)

    def _prefetch_adapter(self, adapter_id: AdapterId) -> None:
        """Of a model that is gone, nothing is to come; who uses the adapter hears why it cannot."""
        if (engine := self._host.engine) is not None:
            try:
                engine.prefetch_adapter(adapter_id)
            except FlashServeError as error:
                _log.warning("an adapter was not loaded ahead: %s", error)

    def _drop_adapter(self, order: DropAdapter) -> None:
        """Of a model that is gone, nothing is left to drop."""
        if (engine := self._host.engine) is not None:
            engine.drop_adapter(order.adapter_id, is_damaged=order.is_damaged)

    def _unload(self) -> UnloadReport:
        error = self._arrival_error or ReplicaError("the replica was stopped")
        with self._lock:
            report = self._empty(error)
            self._arrival_error = None
        self._may_work_ahead = True
        return report

    def _lose(self, error: FlashServeError) -> None:
        """The model cannot be computed with: frees it, and tells the agent before its readers."""
        loaded = self._host.loaded
        if loaded is not None:
            lost = ModelLost(loaded.model_id, error.code, error.message)
            self._link.send(Notice("lost", wire.pack(lost)))
        with self._lock:
            self._empty(error)

    def _empty(self, reason: FlashServeError) -> UnloadReport:
        for stream in list(self._streams.values()):
            self._abort(stream)
            self._link.send(Fault(stream.call_id, reason.code, reason.message))
        try:
            return self._host.unload()
        except FlashServeError as error:
            raise EngineUnusableError(f"the model was not put to sleep: {error}") from error

    def _stats(self) -> WorkerStats:
        if (engine := self._host.engine) is None:
            return WorkerStats(KVUsage(), 0, 0)
        return WorkerStats(engine.kv_usage(), engine.num_running, engine.num_waiting)

    def _step(self, engine: BatchingEngine) -> None:
        try:
            outputs = engine.step()
        except FlashServeError as error:
            if failure := self._host.failure:
                self._lose(failure)
                return
            with self._lock:
                self._fail_all(engine, error.code, error.message)
            return
        except Exception as error:
            _log.exception("a step failed; its sequences end")
            with self._lock:
                self._fail_all(engine, InternalError.code, _describe_error("step", error))
            return
        for sequence_id, reason in engine.failed.items():
            if stream := self._sequences.get(sequence_id):
                self._forget(stream)
                self._link.send(Fault(stream.call_id, reason.code, reason.message))
        touched: dict[int, _Stream] = {}
        for sequence_id, token in outputs:
            if stream := self._sequences.get(sequence_id):
                if stream.num_reused is None:
                    stream.num_reused = engine.reused.get(sequence_id, 0)
                    stream.waited_s = engine.waited_s - stream.waited_s
                stream.pending.append(token)
                stream.finished = token.finish_reason is not None
                touched[stream.call_id] = stream
        for stream in touched.values():
            self._send_tokens(stream)
        if touched:
            self._check()

    def _check(self) -> None:
        try:
            self._host.check()
        except SelfCheckError as error:
            _log.error("%s", error)
            self._lose(error)

    def _send_tokens(self, stream: _Stream) -> None:
        """Sends what is pending as one item, if there is credit for it."""
        if stream.pending and stream.credit > 0:
            batch = TokenBatch(tuple(stream.pending))
            if stream.added_at is not None:
                batch = TokenBatch(
                    batch.tokens, stream.added_at, stream.waited_s, stream.num_reused or 0
                )
            self._link.send(Item(stream.call_id, wire.pack(batch)))
            stream.pending.clear()
            stream.added_at = None
            stream.credit -= 1
        if stream.finished and not stream.pending:
            self._forget(stream)
            self._link.send(End(stream.call_id))

    def _fail_all(self, engine: BatchingEngine, code: str, message: str) -> None:
        """Ends every sequence with a Fault, and makes sure that the engine is empty again."""
        streams = list(self._streams.values())
        try:
            for stream in streams:
                self._abort(stream)
            is_empty = not engine.has_work and engine.kv_usage().used == 0
        except Exception as error:
            raise EngineUnusableError(
                f"{message}; then {_describe_error('abort', error)}"
            ) from error
        if not is_empty:
            raise EngineUnusableError(f"{message}; its memory did not come back")
        for stream in streams:
            self._link.send(Fault(stream.call_id, code, message))

    def _abort(self, stream: _Stream) -> None:
        self._forget(stream)
        if self._host.engine is not None and not stream.finished:
            self._host.engine.abort(stream.sequence_id)

    def _forget(self, stream: _Stream) -> None:
        del self._streams[stream.call_id]
        del self._sequences[stream.sequence_id]


def _fault(call: Call, error: Exception) -> Fault:
    if isinstance(error, FlashServeError):
        return Fault(call.id, error.code, error.message)
    _log.error("%s failed", call.method, exc_info=error)
    return Fault(call.id, InternalError.code, _describe_error(call.method, error))


def _describe_error(what: str, error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{what} failed: {type(error).__name__}: {lines[0] if lines else ''}"
