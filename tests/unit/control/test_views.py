from __future__ import annotations

import pytest
from tests.unit.control.fake_nodes import model, node
from tests.unit.control.test_starts import fleet

from flashserve.errors import ModelNotFoundError
from flashserve.messages.events import EvictRequested
from flashserve.types import ModelId, ReplicaId, Tier

A = ModelId("a")


def test_a_view_follows_a_model_through_its_life() -> None:
    f = fleet()
    view = f.controller.model_view(A)
    assert (view.state, view.tier, view.reason) == ("cold", Tier.DISK, "deployed")
    assert view.last_used_at is None
    f.now = 5.0
    f.arrive("r1", "a")
    view = f.controller.model_view(A)
    assert (view.state, view.num_replicas, view.waiting, view.in_flight) == ("loading", 1, 1, 0)
    assert (view.last_used_at, view.tier, view.dram_bytes) == (5.0, Tier.DISK, 0)
    f.answer_all()
    view = f.controller.model_view(A)
    assert (view.state, view.tier, view.waiting, view.in_flight) == ("ready", Tier.DEVICE, 0, 1)
    assert view.dram_bytes == 2 << 20
    assert view.reason == "disk on n1: 0.15 s predicted"
    f.tell(EvictRequested(A, Tier.DRAM))
    assert f.controller.model_view(A).state == "draining"
    f.now = 6.0
    f.finish("r1")
    view = f.controller.model_view(A)
    assert (view.state, view.tier, view.num_replicas) == ("cold", Tier.DISK, 0)
    assert view.last_used_at == 6.0


def test_a_failed_model_says_why() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.fail_replica(ReplicaId("a#1"), "bad_checkpoint")
    view = f.controller.model_view(A)
    assert (view.state, view.reason) == ("failed", "start on n1 failed: it is broken")


def test_the_nodes_of_a_model_have_its_bytes_or_a_replica() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    assert f.controller.nodes_of(A) == frozenset()
    f.arrive("r1", "a")
    assert f.controller.nodes_of(A) == {"n1"}
    f.answer_all()
    f.finish("r1")
    assert f.controller.nodes_of(A) == {"n1"}
    assert f.controller.nodes_of(ModelId("nobody")) == frozenset()


def test_counts_cover_every_model() -> None:
    f = fleet(model("a"), model("b"))
    f.arrive("a1", "a")
    f.answer_all()
    f.arrive("a2", "a")
    f.arrive("b1", "b")
    assert (f.controller.num_in_flight, f.controller.num_waiting) == (2, 1)


def test_a_model_that_is_not_deployed_has_no_view() -> None:
    with pytest.raises(ModelNotFoundError, match="nobody"):
        fleet().controller.model_view(ModelId("nobody"))
