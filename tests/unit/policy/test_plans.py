from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.policy.facts import facts

from flashserve.policy.plans import Plan, trusted
from flashserve.types import Scaling

SOUND = Plan(1, 30.0, 160.0, rate_per_s=0.01, heed_first=0.1, why="why")
ANY = st.floats(allow_nan=True, allow_infinity=True)


def test_a_sound_plan_is_carried_out_as_it_is() -> None:
    assert trusted(SOUND, facts(), now=100.0) is SOUND
    forever = Plan(0, math.inf)
    assert trusted(forever, facts(), now=100.0) is forever


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"replicas": 10**9}, {"replicas": 4}),
        ({"replicas": -3}, {"replicas": 0}),
        ({"replicas": math.nan}, {"replicas": 0}),
        ({"keep_idle_s": math.nan}, {"keep_idle_s": 300.0}),
        ({"keep_idle_s": -1.0}, {"keep_idle_s": 300.0}),
        ({"review_at": math.nan}, {"review_at": 101.0}),
        ({"review_at": 99.0}, {"review_at": 101.0}),
        ({"review_at": math.nextafter(100.0, math.inf)}, {"review_at": 101.0}),
        ({"review_at": -math.inf}, {"review_at": 101.0}),
        ({"rate_per_s": math.nan}, {"rate_per_s": None}),
        ({"rate_per_s": math.inf}, {"rate_per_s": None}),
        ({"rate_per_s": -1.0}, {"rate_per_s": None}),
    ],
)
def test_what_cannot_be_meant_is_put_right(
    said: dict[str, float], meant: dict[str, float | None]
) -> None:
    plan = msgspec.structs.replace(SOUND, **said)  # type: ignore[arg-type]
    assert trusted(plan, facts(), now=100.0) == msgspec.structs.replace(SOUND, **meant)  # type: ignore[arg-type]


@given(replicas=st.integers() | ANY, keep_idle_s=ANY, review_at=ANY, rate=ANY | st.none())
def test_whatever_a_policy_says_stays_within_bounds(
    replicas: int, keep_idle_s: float, review_at: float, rate: float | None
) -> None:
    known = facts(scaling=Scaling(1, 3))
    plan = trusted(Plan(replicas, keep_idle_s, review_at, rate), known, now=50.0)
    assert plan.replicas in {1, 2, 3}
    assert isinstance(plan.replicas, int)
    assert plan.keep_idle_s >= 0
    assert plan.review_at > 50.0
    assert plan.rate_per_s is None or 0 <= plan.rate_per_s < math.inf
