from __future__ import annotations

import math

import msgspec
import pytest
from tests.unit.policy.facts import facts

from flashserve.errors import InputError
from flashserve.policy.cost import Prices
from flashserve.policy.histogram import HybridHistogram
from flashserve.policy.oracle import Oracle
from flashserve.policy.registry import LIVE, ORACLE, make_policy
from flashserve.types import ModelId, Scaling

M = ModelId("m")


def test_a_fixed_keep_alive_is_the_model_s_or_the_server_s_or_its_own() -> None:
    assert make_policy("keep-alive", Prices()).plan(facts(), 0.0).keep_idle_s == 300.0
    assert make_policy("keep-alive-10m", Prices()).plan(facts(), 0.0).keep_idle_s == 600.0
    assert make_policy("keep-alive-1h", Prices()).name == "keep-alive-1h"


def test_always_on_wants_a_replica_of_everything_for_ever() -> None:
    plan = make_policy("always-on", Prices()).plan(facts(), 0.0)
    assert (plan.replicas, plan.keep_idle_s) == (1, math.inf)


def test_a_reactive_policy_follows_running_and_waiting_requests_within_bounds() -> None:
    reactive = make_policy("reactive", Prices())
    assert reactive.plan(facts(in_flight=8, waiting=1), 0.0).replicas == 2
    assert reactive.plan(facts(in_flight=800), 0.0).replicas == 4
    assert reactive.plan(facts(scaling=Scaling(2, 4)), 0.0).replicas == 2
    assert reactive.plan(facts(), 0.0).keep_idle_s == 300.0


def test_serverlessllm_s_replicas_do_not_give_way_before_their_keep_alive() -> None:
    policy = make_policy("serverlessllm-30s", Prices())
    assert not policy.shares_slots
    assert policy.plan(facts(), 0.0).keep_idle_s == 30.0


@pytest.mark.parametrize("name", ["", "keepalive", "keep-alive-10", "oracle", "flashserve "])
def test_an_unknown_policy_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(InputError, match="there are flashserve, keep-alive, reactive"):
        make_policy(name, Prices())


def test_every_policy_that_a_server_can_run_is_made_by_its_name() -> None:
    assert [make_policy(name, Prices()).name for name in LIVE] == list(LIVE)
    assert make_policy(ORACLE, Prices(), future={}).name == ORACLE


def test_the_oracle_starts_just_in_time_and_keeps_nothing_over_long_gaps() -> None:
    oracle = Oracle({M: [0.0, 100.0]})
    plan = oracle.plan(facts(num_replicas=1), now=0.0)
    assert (plan.replicas, plan.keep_idle_s) == (0, 0.0)
    assert plan.review_at == pytest.approx(98.75)
    assert oracle.plan(facts(), now=98.75).replicas == 1
    assert oracle.plan(facts(), now=100.0).reason == "no further request"


def test_the_oracle_keeps_to_a_start_that_was_due_though_starts_turn_out_to_be_quicker() -> None:
    oracle = Oracle({M: [100.0]})
    due_at = oracle.plan(facts(), now=0.0).review_at
    quicker = facts(restart_s=facts().restart_s / 2)
    assert oracle.plan(quicker, now=due_at).replicas == 1
    assert (
        oracle.plan(msgspec.structs.replace(quicker, num_replicas=1), now=due_at + 0.1).replicas
        == 1
    )


def test_the_oracle_keeps_what_is_used_again_before_a_start_would_be_over() -> None:
    plan = Oracle({M: [0.9]}).plan(facts(num_replicas=1), now=0.0)
    assert plan.replicas == 1


def arrivals(policy: HybridHistogram, minutes: list[float]) -> None:
    for minute in minutes:
        policy.arrived(M, minute * 60)


def test_the_histogram_lets_a_timer_s_model_go_and_warms_it_before_the_next_time() -> None:
    policy = HybridHistogram()
    arrivals(policy, [0, 30, 60, 90, 120])
    known = facts(num_replicas=1, last_arrival_at=7200.0)
    after = policy.plan(known, now=7210.0)
    assert (after.replicas, after.keep_idle_s) == (0, 0.0)
    assert after.review_at == 7200.0 + 27 * 60
    before_the_next = policy.plan(known, now=7200.0 + 27 * 60)
    assert before_the_next.replicas == 1
    assert before_the_next.review_at == 7200.0 + 33 * 60
    assert policy.plan(known, now=7200.0 + 33 * 60).replicas == 0


def test_the_histogram_keeps_for_its_whole_range_what_it_cannot_tell() -> None:
    policy = HybridHistogram()
    arrivals(policy, [0])
    plan = policy.plan(facts(num_replicas=1, last_arrival_at=0.0), now=1.0)
    assert (plan.replicas, plan.review_at) == (1, 240 * 60)


def test_gaps_beyond_the_range_are_forecast() -> None:
    seen: list[list[int]] = []

    def next_gap(gaps: object) -> float:
        assert isinstance(gaps, list)
        seen.append(gaps)
        return 400.0

    policy = HybridHistogram(next_gap)
    arrivals(policy, [0, 390, 800])
    known = facts(num_replicas=1, last_arrival_at=48000.0)
    plan = policy.plan(known, now=48001.0)
    assert seen == [[390, 410]]
    assert plan.replicas == 0
    assert plan.review_at == 48000.0 + 340 * 60
    policy.plan(known, now=48002.0)
    assert len(seen) == 1, "the same gaps are forecast once"


def test_a_deleted_model_s_histogram_is_forgotten() -> None:
    policy = HybridHistogram()
    arrivals(policy, [0, 30, 60, 90])
    policy.forget(M)
    plan = policy.plan(facts(last_arrival_at=5400.0), now=5401.0)
    assert plan.reason == "no arrivals yet"
