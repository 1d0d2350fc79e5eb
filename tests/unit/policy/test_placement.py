from __future__ import annotations

from flashserve.policy.cost import Costs, startup_s
from flashserve.policy.placement import NodeView, place
from flashserve.types import NodeId, Tier

GB = 10**9
COSTS = Costs(
    remote_bytes_per_s=0.2 * GB,
    disk_bytes_per_s=1.0 * GB,
    dram_bytes_per_s=20.0 * GB,
    place_s=0.0,
    init_s=0.07,
)


def view(
    name: str, tier: Tier = Tier.DISK, slots: int = 1, free: int = GB, **costs: float
) -> NodeView:
    startup = startup_s(GB, tier, COSTS._replace(**costs))
    return NodeView(NodeId(name), tier, startup, slots, free)


def test_nowhere_to_place() -> None:
    assert place([]) is None


def test_bytes_in_dram_beat_bytes_on_disk_and_the_reason_says_by_how_much() -> None:
    placement = place([view("n2"), view("n1", Tier.DRAM)])
    assert placement is not None
    assert placement.node_id == "n1"
    assert placement.reason == "dram on n1: 0.12 s predicted, next best n2 1.1 s"
    assert placement.tier is Tier.DRAM


def test_a_fast_disk_beats_dram_whose_workers_are_still_starting() -> None:
    starting = view("n1", Tier.DRAM, place_s=3.0)
    placement = place([starting, view("n2")])
    assert placement is not None
    assert placement.node_id == "n2"


def test_of_equal_nodes_the_emptier_one_is_taken_and_then_the_first_by_name() -> None:
    def best(*views: NodeView) -> str:
        placement = place(views)
        assert placement is not None
        return placement.node_id

    assert best(view("n1", slots=1), view("n2", slots=3)) == "n2"
    assert best(view("n1", free=GB), view("n2", free=2 * GB)) == "n2"
    assert best(view("n2"), view("n1")) == best(view("n1"), view("n2")) == "n1"


def test_one_node_has_no_next_best() -> None:
    placement = place([view("n1", Tier.REMOTE)])
    assert placement is not None
    assert placement.reason == "remote on n1: 5.1 s predicted"
