from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from flashserve.errors import InputError
from flashserve.forecast import synthetic
from flashserve.forecast.core import History
from flashserve.forecast.traces import Trace
from flashserve.sim.lengths import Lengths
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload

TRACE = synthetic.functions(40, 240, seed=1).trace
SHORT = (Lengths("one", np.array([10, 20]), np.array([3, 4])),)


def made(trace: Trace = TRACE, **settings: object) -> Workload:
    return make_workload(trace, WorkloadSettings(**settings), SHORT)  # type: ignore[arg-type]


def test_a_seed_gives_the_same_workload_and_another_one_another() -> None:
    one, same, other = made(seed=3), made(seed=3), made(seed=4)
    events = [[(at, event) for at, event, _ in w.arrivals()] for w in (one, same, other)]
    assert events[0] == events[1]
    assert events[0] != events[2]
    assert one.models == same.models


def test_arrivals_come_in_order_and_as_many_as_were_counted() -> None:
    workload = made(num_models=60, num_requests=900)
    arrivals = list(workload.arrivals())
    times = [at for at, _, _ in arrivals]
    assert times == sorted(times)
    assert len(arrivals) == workload.num_requests
    assert [job.index for _, _, job in arrivals] == list(range(len(arrivals)))
    counted = np.zeros_like(workload.counts)
    numbers = {model.model_id: i for i, model in enumerate(workload.models)}
    for at, event, _ in arrivals:
        counted[numbers[event.model_id], int(at // workload.slot_s)] += 1
    assert (counted == workload.counts).all()


def test_series_are_drawn_in_proportion_to_their_weights() -> None:
    counts = np.zeros((2, 120), np.float32)
    counts[0], counts[1] = 1, 2
    trace = Trace("two", History(("a", "b"), 0, counts), np.array([9.0, 1.0]))
    totals = made(trace, num_models=1000).counts.sum(axis=1)
    assert 0.85 < (totals == 120).mean() < 0.95


def test_a_function_that_is_drawn_again_comes_at_other_times() -> None:
    counts = np.zeros((1, 500), np.float32)
    counts[0, 100] = 1
    trace = Trace("one", History(("a",), 0, counts), np.ones(1))
    at = made(trace, num_models=20).counts.argmax(axis=1)
    assert at[0] == 100
    assert len(set(at.tolist())) > 15


def test_thinning_spares_the_rare_models_and_meets_the_total() -> None:
    counts = np.zeros((10, 200), np.float32)
    counts[:9, 7] = 3
    counts[9] = 50
    trace = Trace("one busy", History(tuple("abcdefghij"), 0, counts), np.ones(10))
    workload = made(trace, num_models=200, num_requests=5000)
    totals = workload.counts.sum(axis=1)
    assert abs(workload.num_requests - 5000) < 300
    assert (totals[totals < 100] == 3).all()


def test_compression_shortens_time_and_keeps_the_requests() -> None:
    plain, fast = made(seed=5), made(seed=5, compression=4.0)
    assert fast.duration_s == plain.duration_s / 4
    assert fast.num_requests == plain.num_requests
    assert fast.minute_counts().counts.shape[1] == 60
    assert fast.minute_counts().counts.sum() == plain.minute_counts().counts.sum()


def test_the_rest_of_a_workload_has_the_same_requests_earlier() -> None:
    whole = made(num_models=20)
    past, rest = whole.after(100)
    assert (past.start, past.counts.shape[1]) == (-100, 100)
    assert past.counts.sum() + rest.num_requests == whole.num_requests
    later = [(at - 6000.0, event.model_id) for at, event, _ in whole.arrivals() if at >= 6000.0]
    moved = [(at, event.model_id) for at, event, _ in rest.arrivals()]
    assert [model for _, model in moved] == [model for _, model in later]
    assert [at for at, _ in moved] == pytest.approx([at for at, _ in later])
    with pytest.raises(InputError, match="240 slots"):
        whole.after(240)


def test_lengths_are_those_of_real_requests_and_fit_the_context() -> None:
    pairs = {(job.prompt_tokens, job.output_tokens) for _, _, job in made(num_models=20).arrivals()}
    assert pairs == {(10, 3), (20, 4)}
    short = made(num_models=20, context_tokens=12)
    assert all(
        job.prompt_tokens + job.output_tokens <= 12 and job.output_tokens >= 1
        for _, _, job in short.arrivals()
    )


def test_adapters_prefixes_and_tenants_follow_a_zipf_law() -> None:
    workload = made(
        num_models=30, adapters_per_model=4, adapter_share=0.5, prefixes_per_model=3, num_tenants=2
    )
    events = [event for _, event, _ in workload.arrivals()]
    share = np.mean([bool(event.adapter) for event in events])
    assert 0.4 < share < 0.6
    counted = [sum(event.adapter == f"a{k}" for event in events) for k in range(4)]
    assert counted == sorted(counted, reverse=True)
    assert {event.prefix for event in events} == {0, 1, 2}
    assert {event.tenant for event in events} == {"", "t1"}


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_models": 0}, "num_models"),
        ({"compression": float("nan")}, "compression"),
        ({"adapter_share": 2.0}, "adapter_share"),
        ({"num_requests": 0}, "num_requests"),
        ({"model_bytes": ()}, "model_bytes"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(
    settings: dict[str, object], named: str
) -> None:
    with pytest.raises(InputError, match=named):
        made(**settings)


def test_a_trace_without_arrivals_is_refused() -> None:
    empty = Trace("empty", History(("a",), 0, np.zeros((1, 100), np.float32)), np.ones(1))
    with pytest.raises(InputError, match="no arrivals"):
        made(empty)
    with pytest.raises(InputError, match="tokens"):
        made(dataclasses.replace(TRACE, unit="tokens"))
