from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.sim.engines import Served, serve

from flashserve.sim.closed import ClosedEngine
from flashserve.sim.engine import BatchedEngine
from flashserve.sim.profiles import EngineShape, StepCosts
from flashserve.sim.steps import AdapterSlots, Job, SteppedEngine
from flashserve.types import RequestId

COSTS = StepCosts(1000, 0.01, 0.04, 0.001, 0.002, 0.005)
SHAPE = EngineShape(max_sequences=8, max_tokens=64, block_tokens=4, kv_tokens=4096)
KINDS = {"closed": ClosedEngine, "batched": BatchedEngine}


def job(name: str, prompt: int = 10, output: int = 5, **rest: object) -> Job:
    return Job(RequestId(name), prompt, output, **rest)  # type: ignore[arg-type]


def engine(kind: str, shape: EngineShape = SHAPE, **rest: object) -> SteppedEngine:
    return KINDS[kind](COSTS, shape, **rest)  # type: ignore[arg-type]


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_request_alone_takes_its_prefill_and_a_step_for_each_further_token(kind: str) -> None:
    done = serve(engine(kind), [(1.0, job("a"))])
    first = 1.0 + 0.05 + 10 * 0.001
    assert done["a"].first_token_at == pytest.approx(first)
    assert done["a"].finished_at == pytest.approx(first + 4 * 0.052)


def test_a_long_prompt_is_computed_in_chunks_beside_the_decodes(kind: str) -> None:
    done = serve(engine(kind), [(0.0, job("a", 1, 100)), (0.051, job("b", 126, 1))])
    # 63 tokens of the prompt and one decode, twice.
    assert done["b"].first_token_at == pytest.approx(0.051 + 2 * (0.05 + 0.063 + 0.002))


def test_who_comes_during_a_step_joins_the_next_one(kind: str) -> None:
    done = serve(engine(kind), [(0.0, job("a", 1, 100)), (0.051 + 0.052 * 3.5, job("b", 1, 1))])
    joined = 0.051 + 0.052 * 4
    assert done["b"].first_token_at == pytest.approx(joined + 0.05 + 0.001 + 0.002)


def test_a_full_batch_lets_the_next_wait_for_an_end(kind: str) -> None:
    shape = EngineShape(max_sequences=1, max_tokens=64, block_tokens=4, kv_tokens=4096)
    done = serve(engine(kind, shape), [(0.0, job("a")), (0.01, job("b"))])
    assert done["b"].first_token_at == pytest.approx(done["a"].finished_at + 0.06)


def test_the_first_step_waits_for_the_weights(kind: str) -> None:
    waiting = job("a")
    done = serve(engine(kind, is_open=False), [(0.0, waiting)], opens_at=3.0)
    assert done["a"].first_token_at == pytest.approx(3.0 + 0.06 / 32)
    assert waiting.gated_s == pytest.approx(3.0 + 0.06 / 32 - 0.06)


def test_weights_that_come_soon_enough_cost_nothing(kind: str) -> None:
    waiting = job("a")
    done = serve(engine(kind, is_open=False), [(0.0, waiting)], opens_at=0.01)
    assert done["a"].first_token_at == pytest.approx(0.06)
    assert waiting.gated_s == pytest.approx(0.0)


def test_a_prefix_that_was_computed_before_is_not_computed_again(kind: str) -> None:
    prefix = {"prefix": 7, "prefix_tokens": 40}
    jobs = [(0.0, job("a", 50, 1, **prefix)), (5.0, job("b", 50, 1, **prefix))]
    done = serve(engine(kind), [*jobs, (9.0, job("c", 50, 1, prefix=8, prefix_tokens=40))])
    assert done["a"].first_token_at == pytest.approx(0.1)
    assert done["b"].first_token_at == pytest.approx(5.0 + 0.05 + 0.01)
    assert done["c"].first_token_at == pytest.approx(9.1)


def test_an_adapter_that_is_not_there_is_loaded_first(kind: str) -> None:
    slots = AdapterSlots(1, load_s=0.5)
    jobs = [(0.0, job("a", adapter="x")), (5.0, job("b", adapter="x")), (9.0, job("c"))]
    done = serve(engine(kind, adapters=slots), [*jobs, (15.0, job("d", adapter="y"))])
    assert done["a"].first_token_at == pytest.approx(0.5 + 0.06 + 0.005)
    assert done["b"].first_token_at == pytest.approx(5.065)
    assert done["c"].first_token_at == pytest.approx(9.06)
    assert done["d"].first_token_at == pytest.approx(15.565)
    assert slots.num_loads == 2


def test_an_adapter_waits_while_another_is_in_use_and_no_room_is_left(kind: str) -> None:
    slots = AdapterSlots(1, load_s=0.5)
    jobs = [(0.0, job("a", adapter="x")), (0.6, job("b", adapter="y")), (0.6, job("c"))]
    done = serve(engine(kind, adapters=slots), jobs)
    assert done["b"].first_token_at >= done["a"].finished_at + 0.5
    assert done["c"].first_token_at < done["a"].finished_at


class EveryRun(ClosedEngine):
    """Is called at the end of each run."""

    def _look_past(self) -> None:
        pass


@given(
    st.lists(st.tuples(st.floats(0, 2), st.integers(1, 200), st.integers(1, 40)), max_size=12),
    st.none() | st.floats(0, 3),
)
def test_an_engine_that_is_called_less_for_who_is_alone_gives_exactly_the_same(
    arrivals: list[tuple[float, int, int]], opens_at: float | None
) -> None:
    found = []
    for kind in (ClosedEngine, EveryRun):
        at = 0.0
        jobs = []
        for number, (gap_s, prompt, output) in enumerate(arrivals):
            at += gap_s
            jobs.append((at, job(str(number), prompt, output)))
        made = kind(COSTS, SHAPE, is_open=opens_at is None)
        done = serve(made, jobs, opens_at=opens_at)
        times = {name: (one.first_token_at, one.finished_at) for name, one in done.items()}
        found.append((times, [one.gated_s for _, one in jobs], made.num_steps))
    assert found[0] == found[1]


def test_a_replica_that_is_lost_leaves_what_was_emitted(kind: str) -> None:
    made, running = engine(kind), job("a", 10, 50)
    made.add(running, 0.0)
    made.advance(min(made.next_at, 0.07))  # one of them goes past the end of the prompt
    made.drop(0.06 + 0.052 * 7.5)
    assert running.num_emitted == 8
    done = serve(engine(kind), [(10.0, running)])
    assert done["a"].first_token_at == pytest.approx(0.06)
    assert done["a"].finished_at == pytest.approx(10.0 + 0.05 + 0.018 + 41 * 0.052)


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[float, Job]]:
    seed = draw(st.integers(0, 10_000))
    rng = random.Random(seed)
    at, jobs = 0.0, []
    gap, adapters = draw(st.sampled_from([0.05, 0.5])), draw(st.booleans())
    for number in range(draw(st.integers(1, 25))):
        at += rng.expovariate(1 / gap)
        prefix = rng.randrange(3) if draw(st.booleans()) else None
        adapter = f"x{rng.randrange(3)}" if adapters and rng.random() < 0.7 else ""
        jobs.append(
            (
                at,
                Job(
                    RequestId(f"r{number}"),
                    rng.randrange(1, 90),
                    rng.randrange(1, 60),
                    adapter,
                    prefix,
                    20,
                ),
            )
        )
    return jobs


@settings(max_examples=60, deadline=None)
@given(jobs=loads(), kv_tokens=st.sampled_from([160, 400, 4096]), slots=st.integers(1, 3))
def test_many_steps_at_once_are_the_same_as_one_after_the_other(
    jobs: list[tuple[float, Job]], kv_tokens: int, slots: int
) -> None:
    shape = EngineShape(max_sequences=4, max_tokens=32, block_tokens=4, kv_tokens=kv_tokens)

    def run(*, skips: bool) -> tuple[dict[str, Served], int, int]:
        made = BatchedEngine(COSTS, shape, AdapterSlots(slots, 0.13), skips=skips)
        copies = [
            (
                at,
                job(
                    j.request_id,
                    j.prompt_tokens,
                    j.output_tokens,
                    adapter=j.adapter,
                    prefix=j.prefix,
                    prefix_tokens=j.prefix_tokens,
                ),
            )
            for at, j in jobs
        ]
        return serve(made, copies), made.num_steps, made.num_preemptions

    (fast, num_fast, preempted), (plain, num_plain, same) = run(skips=True), run(skips=False)
    assert (num_fast, preempted) == (num_plain, same)
    assert fast.keys() == plain.keys() == {j.request_id for _, j in jobs}
    for name, one in plain.items():
        assert fast[name].first_token_at == pytest.approx(one.first_token_at, abs=1e-6)
        assert fast[name].finished_at == pytest.approx(one.finished_at, abs=1e-6)


@pytest.mark.parametrize("load", ["light", "heavy", "adapters", "prefixes"])
def test_the_closed_form_comes_close_to_the_real_batching(load: str) -> None:
    """Within 2 % in the mean of first tokens and ends, over some hundreds of random requests."""
    rng = random.Random(5)
    at, jobs = 0.0, []
    for number in range(400):
        at += rng.expovariate(4.0 if load == "heavy" else 1.5)
        adapter = f"x{rng.randrange(6)}" if load == "adapters" else ""
        prefix = rng.randrange(4) if load == "prefixes" else None
        prompt, output = (
            int(rng.lognormvariate(3.7, 0.8)) + 1,
            int(rng.lognormvariate(2.5, 0.9)) + 1,
        )
        jobs.append((at, (RequestId(f"r{number}"), prompt, output, adapter, prefix, 20)))
    results = []
    for kind in KINDS:
        made = engine(kind, adapters=AdapterSlots(4, 0.05))
        results.append(serve(made, [(at, Job(*rest)) for at, rest in jobs]))
    for value in (
        lambda at, one: one.first_token_at - at,
        lambda at, one: one.finished_at - at,
    ):
        closed, batched = (
            statistics.fmean(value(at, done[rest[0]]) for at, rest in jobs) for done in results
        )
        assert closed == pytest.approx(batched, rel=0.02)
