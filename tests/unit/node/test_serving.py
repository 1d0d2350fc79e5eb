"""The worker's loop, with a link and an engine that are lists."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import ClassVar

import pytest

from flashserve.errors import (
    CheckpointError,
    FlashServeError,
    InputError,
    InternalError,
    SelfCheckError,
    WireError,
)
from flashserve.messages import wire
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, Frame, Item, Notice, Reply
from flashserve.messages.work import (
    AdapterImage,
    DescribeModel,
    DropAdapter,
    GenerateJob,
    LoadModel,
    LoadReport,
    ModelDescription,
    ModelLost,
    Opened,
    Prepare,
    TokenBatch,
    UnloadReport,
    WorkerReady,
    WorkerStats,
)
from flashserve.node.serving import EngineUnusableError, Serving
from flashserve.types import AdapterId, KVUsage, ModelId, SamplingParams, TokenOutput

READY = WorkerReady(1, "none", 1)


class Link:
    """Gives what is put into `incoming` turn by turn, and ends the loop after it."""

    def __init__(self, *turns: Sequence[Frame]) -> None:
        self.incoming = collections.deque(turns)
        self.sent: list[Frame] = []
        self.patience: list[float | None] = []
        self.on_frame: Callable[[Frame], None] = lambda frame: None

    def listen(self, on_frame: Callable[[Frame], None], on_end: Callable[[], None]) -> None:
        self.on_frame = on_frame

    def send(self, frame: Frame) -> None:
        self.sent.append(frame)

    def poll(self, timeout_s: float | None) -> Sequence[Frame]:
        self.patience.append(timeout_s)
        if not self.incoming:
            raise ConnectionResetError
        turn = self.incoming.popleft()
        for frame in turn:
            self.on_frame(frame)
        return turn


class Engine:
    """Emits one token of each sequence at every step; a sequence ends with its max_tokens."""

    num_waiting = 0
    waited_s = 0.0
    reused: ClassVar[dict[str, int]] = {}

    def __init__(self) -> None:
        self.adapters: list[str] = []
        self.prefetched: list[str] = []
        self.damaged: list[str] = []
        self.failed: dict[str, FlashServeError] = {}
        self.jobs: dict[str, list[int]] = {}
        self.fails_at_step = -1
        self.is_broken = False
        self.step_error: FlashServeError | None = None
        self._num_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.jobs)

    @property
    def num_running(self) -> int:
        return len(self.jobs)

    def kv_usage(self) -> KVUsage:
        return KVUsage(10, len(self.jobs), 0, 10 - len(self.jobs))

    def add(self, job: GenerateJob) -> None:
        if not job.prompt_ids:
            raise InputError("the prompt is empty")
        if job.adapter_id is not None and job.adapter_id not in self.adapters:
            raise InputError(f"the replica was not told of adapter {job.adapter_id}")
        self.jobs[job.sequence_id] = [0, job.params.max_tokens]

    def put_adapter(self, image: AdapterImage) -> None:
        self.adapters.append(image.adapter_id)

    def prefetch_adapter(self, adapter_id: AdapterId) -> None:
        if adapter_id not in self.adapters:
            raise InputError(f"the replica was not told of adapter {adapter_id}")
        self.prefetched.append(adapter_id)

    def drop_adapter(self, adapter_id: AdapterId, *, is_damaged: bool = False) -> None:
        if adapter_id not in self.adapters:
            raise RuntimeError("cannot drop")
        self.adapters.remove(adapter_id)
        if is_damaged:
            self.damaged.append(adapter_id)

    def abort(self, sequence_id: str) -> None:
        if self.is_broken:
            raise RuntimeError("cannot abort")
        self.jobs.pop(sequence_id, None)

    def step(self) -> list[tuple[str, TokenOutput]]:
        self._num_steps += 1
        if self._num_steps == self.fails_at_step:
            raise MemoryError("no memory")
        if self.step_error is not None:
            raise self.step_error
        for sequence_id in self.failed:
            self.jobs.pop(sequence_id, None)
        outputs = []
        for sequence_id, (index, end) in list(self.jobs.items()):
            is_last = index + 1 == end
            self.jobs[sequence_id][0] += 1
            if is_last:
                del self.jobs[sequence_id]
            reason = "length" if is_last else None
            outputs.append((sequence_id, TokenOutput(index, index, finish_reason=reason)))
        return outputs


class Host:
    def __init__(self, engine: Engine | None = None) -> None:
        self.engine = engine
        self.hints: list[Prepare] = []
        self.num_unloads = 0
        self.load_error: Exception | None = None
        self.num_open = 0
        self.num_checks = 0
        self.check_error: SelfCheckError | None = None
        self.failure: FlashServeError | None = None
        self.arrival_error: FlashServeError | None = None

    def load(self, order: LoadModel) -> LoadReport:
        if self.load_error:
            raise self.load_error
        self.engine = Engine()
        return LoadReport(0.5, 0.25, self.engine.kv_usage())

    def unload(self) -> UnloadReport:
        self.engine = None
        self.num_unloads += 1
        return UnloadReport((ModelId("m"),))

    @property
    def loaded(self) -> LoadModel | None:
        return LoadModel(ModelId("m"), {}, {}, ()) if self.engine is not None else None

    def check(self) -> None:
        self.num_checks += 1
        if self.check_error is not None:
            raise self.check_error

    def opened(self, news: Opened) -> None:
        self.num_open = news.num_open

    def fail_arrival(self, error: FlashServeError) -> None:
        self.arrival_error = error

    def describe(self, order: DescribeModel) -> ModelDescription:
        return ModelDescription("Some", 1, 2, 3)

    def prepare(self, hint: Prepare) -> None:
        self.hints.append(hint)

    def work_ahead(self) -> bool:
        if self.hints:
            self.hints.pop()
        return bool(self.hints)


def generate(call_id: int, max_tokens: int, *, sequence_id: str = "", prompt: int = 1) -> Call:
    params = SamplingParams(max_tokens=max_tokens)
    job = GenerateJob(sequence_id or f"s{call_id}", (7,) * prompt, params)
    return Call(call_id, "generate", wire.pack(job))


LOAD = wire.pack(LoadModel(ModelId("m"), {}, {}, ()))


def serve(host: Host, *turns: Sequence[Frame]) -> Link:
    link = Link(*turns)
    with pytest.raises(ConnectionResetError):
        Serving(link, host, READY).run()  # type: ignore[arg-type]
    return link


def items(link: Link, call_id: int) -> list[TokenBatch]:
    return [
        wire.unpack(frame.body, TokenBatch)
        for frame in link.sent
        if isinstance(frame, Item) and frame.id == call_id
    ]


def indices(batches: Sequence[TokenBatch]) -> list[int]:
    return [token.index for batch in batches for token in batch.tokens]


def test_the_first_frame_says_ready() -> None:
    (first,) = serve(Host()).sent
    assert isinstance(first, Notice)
    assert wire.unpack(first.body, WorkerReady) == READY


def test_a_sequence_streams_its_tokens_and_ends() -> None:
    link = serve(Host(Engine()), [generate(1, 3)], [], [], [])
    batches = items(link, 1)
    assert indices(batches) == [0, 1, 2]
    assert link.sent[-1] == End(1)
    assert [batch.added_at is not None for batch in batches] == [True, False, False]


def test_it_waits_without_end_when_idle_and_not_at_all_while_it_works() -> None:
    link = serve(Host(Engine()), [generate(1, 2)], [], [])
    assert link.patience == [None, 0.0, None, None]


def test_without_credit_tokens_coalesce_and_none_is_lost() -> None:
    quiet: list[Sequence[Frame]] = [[] for _ in range(100)]
    link = serve(Host(Engine()), [generate(1, 100)], *quiet, [Credit(1, 5)])
    batches = items(link, 1)
    assert len(batches) == wire.INITIAL_CREDIT + 1
    assert indices(batches) == list(range(100))
    assert len(batches[-1].tokens) == 100 - wire.INITIAL_CREDIT
    assert link.sent[-1] == End(1)


def test_a_slow_reader_does_not_hold_up_another() -> None:
    quiet: list[Sequence[Frame]] = [[] for _ in range(60)]
    turns = [[Credit(2, 1)] for _ in quiet]
    link = serve(Host(Engine()), [generate(1, 60), generate(2, 60)], *turns)
    assert len(items(link, 1)) == wire.INITIAL_CREDIT
    assert len(items(link, 2)) == 60


def test_a_cancelled_sequence_is_aborted_and_answered() -> None:
    host = Host(engine := Engine())
    link = serve(host, [generate(1, 100)], [], [Cancel(1)], [], [Cancel(1)])
    assert engine.jobs == {}
    assert link.sent[-1] == End(1)
    assert link.sent.count(End(1)) == 1


def test_a_sequence_may_return_under_its_old_name_once_it_has_ended() -> None:
    again = generate(2, 1, sequence_id="s1")
    link = serve(Host(Engine()), [generate(1, 100)], [again], [Cancel(1), generate(3, 1)], [])
    assert isinstance(link.sent[2], Fault)
    link = serve(Host(Engine()), [generate(1, 1)], [again], [])
    assert indices(items(link, 2)) == [0]


def test_a_refused_job_is_a_fault_of_its_call_alone() -> None:
    link = serve(Host(Engine()), [generate(1, 2), generate(2, 2, prompt=0)], [], [])
    assert Fault(2, "invalid_request", "the prompt is empty") in link.sent
    assert indices(items(link, 1)) == [0, 1]


def test_a_job_without_a_model_is_a_lost_replica() -> None:
    (_, fault) = serve(Host(), [generate(1, 2)]).sent
    assert isinstance(fault, Fault)
    assert fault.code == "replica_failed"


def adapted(call_id: int, adapter: str) -> Call:
    params = SamplingParams(max_tokens=1)
    job = GenerateJob(f"s{call_id}", (7,), params, adapter_id=AdapterId(adapter))
    return Call(call_id, "generate", wire.pack(job))


def put(adapter: str) -> Notice:
    return Notice("adapter", wire.pack(AdapterImage(AdapterId(adapter), ())))


def test_an_adapter_is_known_from_its_notice_to_its_drop() -> None:
    drop = Call(2, "drop", wire.pack(DropAdapter(AdapterId("x@1"))))
    # In the order of the frames, also where several come at once.
    turn = [adapted(1, "x@1"), put("x@1"), adapted(3, "x@1"), drop, adapted(4, "x@1")]
    link = serve(Host(Engine()), turn, [], [put("x@1"), adapted(5, "x@1")], [])
    refused = [frame for frame in link.sent if isinstance(frame, Fault)]
    assert [frame.id for frame in refused] == [1, 4]
    assert all("not told of adapter x@1" in frame.message for frame in refused)
    assert Reply(2, wire.pack(None)) in link.sent
    assert indices(items(link, 3)) == indices(items(link, 5)) == [0]


def test_an_adapter_is_loaded_ahead_and_one_that_cannot_be_hurts_nobody() -> None:
    engine = Engine()
    orders = [Notice("prefetch", wire.pack(name)) for name in ("y@1", "x@1")]
    link = serve(Host(engine), [put("x@1"), *orders, adapted(1, "x@1")])
    assert engine.prefetched == ["x@1"]
    assert indices(items(link, 1)) == [0]
    serve(Host(), [*orders])


def test_a_drop_that_fails_is_a_fault_and_one_without_a_model_is_answered() -> None:
    drop = Call(1, "drop", wire.pack(DropAdapter(AdapterId("x@1"))))
    assert isinstance(serve(Host(Engine()), [drop]).sent[-1], Fault)
    assert serve(Host(), [put("x@1"), drop]).sent[-1] == Reply(1, wire.pack(None))


def test_the_engine_hears_whether_a_dropped_adapter_was_damaged() -> None:
    engine = Engine()
    for call_id, is_damaged in enumerate((False, True)):
        drop = Call(call_id, "drop", wire.pack(DropAdapter(AdapterId("x@1"), is_damaged)))
        assert serve(Host(engine), [put("x@1"), drop]).sent[-1] == Reply(call_id, wire.pack(None))
        assert bool(engine.damaged) == is_damaged


def test_a_sequence_that_lost_its_adapter_ends_alone() -> None:
    engine = Engine()
    engine.failed = {"s1": CheckpointError("adapter x@1 is damaged")}
    link = serve(Host(engine), [generate(1, 9), generate(2, 1)], [])
    assert Fault(1, CheckpointError.code, "adapter x@1 is damaged") in link.sent
    assert link.sent[-1] == End(2)


def test_load_describe_stats_and_unload_are_answered() -> None:
    describe = wire.pack(DescribeModel({}, ()))
    calls = [Call(1, "load", LOAD), Call(2, "describe", describe), Call(3, "stats")]
    link = serve(Host(), calls, [Call(4, "unload")], [Call(5, "stats")])
    answers = {frame.id: frame.body for frame in link.sent if isinstance(frame, Reply)}
    assert wire.unpack(answers[1], LoadReport).device_s == 0.5
    assert wire.unpack(answers[2], ModelDescription).architecture == "Some"
    assert wire.unpack(answers[3], WorkerStats).kv.total == 10
    assert wire.unpack(answers[4], UnloadReport).asleep == ("m",)
    assert wire.unpack(answers[5], WorkerStats).kv.total == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(CheckpointError("tensor x is odd"), "bad_checkpoint"), (ValueError("odd"), "internal_error")],
)
def test_a_failing_load_is_a_fault_and_the_next_one_works(error: Exception, code: str) -> None:
    host = Host()
    host.load_error = error
    link = Link([Call(1, "load", LOAD)])
    serving = Serving(link, host, READY)  # type: ignore[arg-type]
    with pytest.raises(ConnectionResetError):
        serving.run()
    fault = link.sent[-1]
    assert isinstance(fault, Fault)
    assert fault.code == code
    assert "odd" in fault.message
    host.load_error = None
    link.incoming.append([Call(2, "load", LOAD)])
    with pytest.raises(ConnectionResetError):
        serving.run()
    assert isinstance(link.sent[-1], Reply)


@pytest.mark.parametrize("call", [Call(1, "dance"), Call(1, "load", wire.pack([1]))])
def test_calls_that_make_no_sense_are_faults(call: Call) -> None:
    (_, fault) = serve(Host(), [call]).sent
    assert isinstance(fault, Fault)


def test_a_hint_that_makes_no_sense_ends_the_worker() -> None:
    with pytest.raises(WireError):
        Serving(Link([Notice("prepare", wire.pack(3))]), Host(), READY).run()  # type: ignore[arg-type]


def test_unloading_ends_what_runs() -> None:
    host = Host(engine := Engine())
    link = serve(host, [generate(1, 100)], [Call(2, "unload")])
    assert engine.jobs == {}
    assert host.num_unloads == 1
    assert [type(frame) for frame in link.sent[-2:]] == [Fault, Reply]


def test_a_failing_step_ends_its_sequences_and_the_engine_goes_on() -> None:
    host = Host(engine := Engine())
    engine.fails_at_step = 2
    link = serve(host, [generate(1, 9), generate(2, 9)], [], [generate(3, 1)], [])
    faults = [frame for frame in link.sent if isinstance(frame, Fault)]
    assert [fault.id for fault in faults] == [1, 2]
    assert "MemoryError: no memory" in faults[0].message
    assert indices(items(link, 3)) == [0]


def test_a_model_is_checked_behind_the_tokens_that_it_has_sent() -> None:
    host = Host(Engine())
    link = serve(host, [], [generate(1, 2)], [], [])
    assert host.num_checks == 2
    assert indices(items(link, 1)) == [0, 1]


def lost_model(host: Host, code: str) -> None:
    """The next step's sequences end behind word that the model is gone, and the loop goes on."""
    link = serve(host, [generate(1, 9), generate(2, 9)], [], [Call(3, "load", LOAD)], [])
    lost, *faults = [frame for frame in link.sent if isinstance(frame, Notice | Fault)][1:]
    assert isinstance(lost, Notice)
    found = wire.unpack(lost.body, ModelLost)
    assert (lost.method, found.model_id, found.code) == ("lost", "m", code)
    assert [(type(fault), fault.id, fault.code) for fault in faults] == [  # type: ignore[union-attr]
        (Fault, 1, code),
        (Fault, 2, code),
    ]
    assert host.num_unloads == 1
    assert isinstance(link.sent[-1], Reply)


def test_a_model_that_computes_something_else_is_given_up() -> None:
    host = Host(Engine())
    host.check_error = SelfCheckError("it differs")
    lost_model(host, "self_check_failed")


def test_a_model_whose_bytes_cannot_be_copied_is_given_up() -> None:
    host = Host(engine := Engine())
    engine.step_error = host.failure = InternalError("no copy today")
    lost_model(host, "internal_error")


def test_an_engine_that_cannot_be_emptied_ends_the_worker() -> None:
    engine = Engine()
    engine.fails_at_step, engine.is_broken = 1, True
    with pytest.raises(EngineUnusableError, match="cannot abort"):
        Serving(Link([generate(1, 9)]), Host(engine), READY).run()  # type: ignore[arg-type]


def test_hints_are_worked_off_only_while_no_model_is_loaded() -> None:
    hint = Notice("prepare", wire.pack(Prepare(((0, 1),), {}, ())))
    host = Host()
    link = serve(host, [hint, hint], [], [])
    assert host.hints == []
    assert link.patience == [None, 0.0, None, None]
    busy = Host(Engine())
    serve(busy, [hint], [], [])
    assert len(busy.hints) == 1
    serve(busy, [hint], [Call(1, "unload")], [], [])
    assert busy.hints == []
