from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashserve.policy.admission import Load, choose_tenant, gives_way, refuse_excess
from flashserve.types import ModelId

WEIGHTS = st.sampled_from([0.1, 0.5, 1.0, 3.0, 10.0])


def test_the_tenant_with_the_least_running_comes_next() -> None:
    busy, quiet = Load("busy", 1.0, 3, 50, head=1), Load("quiet", 1.0, 1, 1, head=90)
    assert choose_tenant([busy, quiet]) == quiet


def test_a_weight_counts_like_so_many_tenants() -> None:
    heavy, light = Load("heavy", 3.0, 2, 1, head=9), Load("light", 1.0, 1, 1, head=1)
    assert choose_tenant([heavy, light]) == heavy


def test_among_equals_the_oldest_request_comes_first() -> None:
    one, other = Load("a", 1.0, 0, 1, head=7), Load("b", 1.0, 0, 1, head=6)
    assert choose_tenant([one, other]) == other
    assert choose_tenant([one._replace(waiting=0), other._replace(waiting=0)]) is None


def test_a_full_queue_takes_a_place_only_from_somebody_who_keeps_more() -> None:
    most = Load("most", 1.0, 0, 8, head=0)
    assert gives_way(most, "new", 1.0, 0)
    assert gives_way(most, "new", 1.0, 6)
    assert not gives_way(most, "new", 1.0, 7)
    assert not gives_way(most, "most", 1.0, 8)
    assert not gives_way(most, "light", 0.5, 4)


@given(st.lists(WEIGHTS, min_size=2, max_size=5), st.integers(1, 40), st.data())
def test_a_full_queue_settles_at_shares_that_follow_the_weights(
    weights: list[float], limit: int, data: st.DataObject
) -> None:
    waiting = [0] * len(weights)
    arrivals = [data.draw(st.integers(0, len(weights) - 1)) for _ in range(limit)]
    for new in arrivals + list(range(len(weights))) * limit:  # in the end everybody wants more
        if sum(waiting) < limit:
            waiting[new] += 1
            continue
        loads = [Load(str(i), weights[i], 0, n, i) for i, n in enumerate(waiting)]
        most = max(loads, key=lambda load: load.waiting / load.weight)
        if gives_way(most, str(new), weights[new], waiting[new]):
            waiting[int(most.tenant)] -= 1
            waiting[new] += 1
    assert sum(waiting) == limit
    for i, one in enumerate(waiting):
        for j, other in enumerate(waiting):
            assert one / weights[i] <= (other + 1) / weights[j] + 1e-9


def test_who_gave_way_is_told_of_his_own_requests_alone() -> None:
    refusal = refuse_excess(ModelId("m"), 256, 200, 256, 0.2)
    assert refusal.code == "queue_full"
    assert refusal.retry_after_s == 1.0
    assert "200 of them are of this key's tenant" in refusal.message
