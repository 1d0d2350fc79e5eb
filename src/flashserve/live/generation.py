"""One request from its arrival to its last token, over as many replicas as that takes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
from collections.abc import Callable, Sequence
from typing import Self

import structlog

from flashserve.errors import FlashServeError, InternalError, ReplicaError, error_from_code
from flashserve.live.choice import Choice
from flashserve.live.requests import Receipt, TextChunk, Usage
from flashserve.live.runtime import Runtime
from flashserve.live.timing import Stopwatch
from flashserve.messages.commands import Dispatch, Hold, Reject, RequestCommand
from flashserve.messages.events import RequestArrived, RequestFinished
from flashserve.messages.work import TokenBatch
from flashserve.types import ModelId, Phases, RequestId

_MAX_BUFFERED = 1024
"""Chunks that wait for a slow reader before its replica is no longer listened to."""
_LOSS_PATIENCE_S = 15.0
"""After a broken stream, the controller must have said within so long what comes next."""
_log = structlog.get_logger(__name__)


class Generation:
    """The chunks of all choices as they come; each choice ends with a finish_reason.

    Iterate it once; iteration raises the FlashServeError that ended the request. Whoever holds it
    calls `aclose` at the end, which aborts what still runs.
    receipt and usage fill as it goes.
    """

    def __init__(
        self,
        runtime: Runtime,
        choices: Sequence[Choice],
        stopwatch: Stopwatch,
        *,
        num_prompt_tokens: int,
        tenant: str = "",
        adapter: str = "",
        on_done: Callable[[Generation], None],
    ) -> None:
        self._runtime = runtime
        self._choices = choices
        self._stopwatch = stopwatch
        self._num_prompt_tokens = num_prompt_tokens
        self._tenant = tenant
        self._adapter = adapter
        self._on_done = on_done
        self._mailbox = runtime.open_mailbox(self.request_id, self.model_id)
        self._buffer = _Buffer()
        self._task: asyncio.Task[None] | None = None
        self._verdict: FlashServeError | None = None
        self._is_done = False

    @property
    def request_id(self) -> RequestId:
        return self.receipt.request_id

    @property
    def model_id(self) -> ModelId:
        return self.receipt.model_id

    @property
    def receipt(self) -> Receipt:
        return self._stopwatch.receipt

    @property
    def predicted(self) -> Phases:
        """The estimated way to the first token, from its arrival."""
        return self.receipt.predicted

    @property
    def usage(self) -> Usage:
        """The prompt counts once, whatever the number of choices and of lost replicas; of it is
        cached what no choice had to compute.
        """
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        cached = [choice.num_cached for choice in self._choices if choice.num_tokens]
        return Usage(self._num_prompt_tokens, completion_tokens, min(cached, default=0))

    async def start(self, deadline_s: float | None) -> None:
        """Tell the controller, and begin once it has admitted the request.

        Raises:
            QueueFullError, DrainingError, ...: it has not. Nothing was generated.
        """
        arrival = RequestArrived(
            self.request_id,
            self.model_id,
            self._num_prompt_tokens,
            deadline_s,
            adapter=self._adapter,
            tenant=self._tenant,
            prefix=self._choices[0].prefix,
        )
        self._runtime.post(arrival)
        try:
            first = await self._mailbox.get()
            if isinstance(first, Reject):
                raise _error_of(first)
            if isinstance(first, Hold):
                self._stopwatch.held(first)
        except BaseException:
            self._finish(None)
            raise
        self._task = asyncio.create_task(self._run(first), name=f"request {self.request_id}")

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TextChunk:
        chunk = await self._buffer.get()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """Abort what still runs. Idempotent; returns when the replica has been told."""
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.wait([self._task])
        if not self._is_done:  # cancelled before its first step, a task never runs its finally
            self._finish(None)

    async def fail(self, error: FlashServeError) -> None:
        """End it from our side: the reader gets what is there already, then `error`."""
        if not self._is_done:
            self._verdict = error
            await self.aclose()

    async def _run(self, first: RequestCommand) -> None:
        error: FlashServeError | None = None
        try:
            await self._generate(first)
        except FlashServeError as problem:
            error = problem
        except Exception:
            _log.exception("request failed", request_id=self.request_id, model_id=self.model_id)
            error = InternalError("the server failed on this request; its log says why")
        finally:
            self._finish(self._verdict or error)

    def _finish(self, error: FlashServeError | None) -> None:
        """Exactly once, whatever happened: the controller hears of the end."""
        if self._is_done:
            return
        self._is_done = True
        self._runtime.close_mailbox(self.request_id)
        self._runtime.post(RequestFinished(self.request_id, self._stopwatch.prefill_s))
        self._stopwatch.finished(self._runtime.clock.now())
        self._buffer.close(error or self._verdict)
        self._on_done(self)

    async def _generate(self, first: RequestCommand) -> None:
        """Stream from one replica after another until every choice has ended."""
        dispatch = await self._dispatch_after(first)
        while True:
            self._stopwatch.dispatched(dispatch, self._runtime.clock.now())
            pending = [choice for choice in self._choices if not choice.is_finished]
            loss = await self._stream_all(pending, dispatch)
            if loss is None:
                return
            self._stopwatch.lost(self._runtime.clock.now())
            _log.info("replica lost; the request goes on", request_id=self.request_id)
            dispatch = await self._dispatch_after(await self._word_after(loss))

    async def _word_after(self, loss: ReplicaError) -> RequestCommand:
        """What the controller says to a broken stream; it hears of the replica by itself."""
        try:
            async with asyncio.timeout(_LOSS_PATIENCE_S):
                return await self._mailbox.get()
        except TimeoutError:
            raise loss from None

    async def _dispatch_after(self, command: RequestCommand) -> Dispatch:
        """The next Dispatch, however often the controller lets the request wait before it."""
        while not isinstance(command, Dispatch):
            if isinstance(command, Reject):
                raise _error_of(command)
            command = await self._mailbox.get()
        return command

    async def _stream_all(
        self, pending: Sequence[Choice], dispatch: Dispatch
    ) -> ReplicaError | None:
        """All choices side by side on one replica; the error of a replica that was lost."""
        if len(pending) == 1:
            return await self._stream(pending[0], dispatch)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._stream(one, dispatch)) for one in pending]
        except* FlashServeError as errors:
            raise _first_of(errors) from None
        return next((loss for task in tasks if (loss := task.result()) is not None), None)

    async def _stream(self, choice: Choice, dispatch: Dispatch) -> ReplicaError | None:
        node = self._runtime.node(dispatch.node_id)
        batches = node.generate(dispatch.replica_id, choice.next_job())
        try:
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    if batch.added_at is not None:
                        self._stopwatch.added(batch.added_at)
                        choice.began(batch.num_reused)
                    if batch.tokens:
                        await self._emit(choice.push(batch.tokens), batch)
                    if choice.is_finished:
                        return None
        except ReplicaError as loss:
            return loss
        raise InternalError(f"the replica ended request {self.request_id} without a last token")

    async def _emit(self, chunk: TextChunk, batch: TokenBatch) -> None:
        self._stopwatch.token(
            batch.tokens[0].emitted_at,
            self._runtime.clock.now(),
            batch.waited_s,
            is_fetched=batch.is_fetched,
        )
        await self._buffer.put(chunk)


class _Buffer:
    """Chunks between the replicas and one reader."""

    def __init__(self) -> None:
        self._chunks: collections.deque[TextChunk] = collections.deque()
        self._changed = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()
        self._is_closed = False
        self._error: FlashServeError | None = None

    async def put(self, chunk: TextChunk) -> None:
        """Takes the chunk; returns when there is room for another."""
        self._chunks.append(chunk)
        self._changed.set()
        if len(self._chunks) >= _MAX_BUFFERED:
            self._has_room.clear()
            await self._has_room.wait()

    async def get(self) -> TextChunk | None:
        """The next chunk; None at the end.

        Raises:
            FlashServeError: what the buffer was closed with, after the last chunk, once.
        """
        while not self._chunks and not self._is_closed:
            self._changed.clear()
            await self._changed.wait()
        if self._chunks:
            self._has_room.set()
            return self._chunks.popleft()
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return None

    def close(self, error: FlashServeError | None) -> None:
        self._is_closed = True
        self._error = error
        self._changed.set()


def _error_of(reject: Reject) -> FlashServeError:
    return error_from_code(reject.code, reject.message, retry_after_s=reject.retry_after_s)


def _first_of(errors: BaseExceptionGroup[FlashServeError]) -> FlashServeError:
    first: BaseException = errors
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    assert isinstance(first, FlashServeError)
    return first
