"""A worker's models on a device that is memory of this process, through its host and its loop."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator

import pytest
import torch
from tests.integration.node.nodes import MIB
from tests.integration.node.test_hosting import leased, load_order, run
from tests.integration.node.tiny import Tiny, make_tiny
from tests.unit.store.device.fake_device import FakeDevice

from flashserve.config import EngineSettings
from flashserve.errors import InternalError, SelfCheckError, UnavailableError
from flashserve.messages.work import LoadModel, Opened, Prepare
from flashserve.node import hosting
from flashserve.node.homes import DeviceHome
from flashserve.node.hosting import ModelHost
from flashserve.node.sleepers import MAX_ASLEEP
from flashserve.store.device.regions import RegisteredArena, address_of
from flashserve.store.dram.arena import attach
from flashserve.store.store import Store
from flashserve.types import ModelId

torch.set_num_threads(1)

PROMPT, NUM_TOKENS = [1, 2, 3], 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "other", seed=1)


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    store = Store(tmp_path, 8 * MIB, prefault=False)
    yield store
    store.close()


class Node:
    """A host whose device copies only when somebody waits for it."""

    def __init__(
        self, store: Store, references: pathlib.Path | None = None, **fail_at: int
    ) -> None:
        self.store = store
        self.device = FakeDevice(**fail_at)
        arena = attach(store.arena.fd, store.arena.num_bytes)
        registered = RegisteredArena(
            self.device, address_of(arena), len(arena), piece_bytes=1 * MIB
        )
        home = DeviceHome(self.device, arena, registered, references)
        self.host = ModelHost(arena, EngineSettings(kv_bytes=1 * MIB), home)

    def order(self, model: Tiny, **changes: object) -> LoadModel:
        with leased(self.store, model) as lease:  # the test evicts nothing meanwhile
            order = load_order(lease)
            return dataclasses.replace(order, identity=lease.snapshot.identity, **changes)

    def serve(self, model: Tiny) -> bool:
        """Loads, generates and unloads; whether the model was asleep."""
        report = self.host.load(self.order(model))
        assert run(self.host, NUM_TOKENS) == model.greedy(PROMPT, NUM_TOKENS)
        self.host.check()
        assert self.device.mapped_bytes > 0
        self.host.unload()
        assert self.device.mapped_bytes == 0
        return report.was_asleep


def test_a_model_that_was_unloaded_wakes_and_says_the_same(store, tiny, other, monkeypatch):
    node = Node(store)
    assert not node.serve(tiny)
    assert not node.serve(other)
    num_registered = node.device.calls.count("register")
    assert num_registered == 8
    monkeypatch.setattr(hosting, "build_skeleton", None)  # a call of it would raise
    for _ in range(2):
        assert node.serve(tiny)
        assert node.serve(other)
    assert node.device.calls.count("register") == num_registered
    assert node.device.calls.count("reserve") == len(node.device.regions) == 2
    assert node.host.unload().asleep == ("tiny", "other")


def test_a_model_of_another_identity_or_of_none_does_not_wake(store, tiny):
    node = Node(store)
    order = node.order(tiny)
    for identity in ("a", "b", "", ""):
        report = node.host.load(dataclasses.replace(order, identity=identity))
        assert not report.was_asleep
        assert run(node.host, NUM_TOKENS) == tiny.greedy(PROMPT, NUM_TOKENS)
        node.host.unload()
    assert len(node.device.regions) == 2
    assert node.device.mapped_bytes == 0


def test_only_so_many_sleep(store, tiny):
    node = Node(store)
    order = node.order(tiny)
    for number in range(MAX_ASLEEP + 3):
        node.host.load(dataclasses.replace(order, identity=str(number)))
        asleep = node.host.unload().asleep
    assert len(asleep) == len(node.device.regions) == MAX_ASLEEP


def test_a_worker_in_which_a_model_sleeps_prepares_no_module_for_it(store, tiny, monkeypatch):
    node = Node(store)
    node.serve(tiny)
    order = node.order(tiny)
    monkeypatch.setattr(hosting, "build_skeleton", None)
    node.host.prepare(Prepare((), order.config, order.tensors, order.identity))
    while node.host.work_ahead():
        pass
    assert node.serve(tiny)


def test_steps_wait_for_bytes_that_are_still_to_come(store, tiny):
    node = Node(store)
    for _ in range(2):
        order = node.order(tiny, num_groups=4, num_open=1)
        node.host.load(order)
        first = node.device.num_enqueued
        node.host.opened(Opened(ModelId("another"), 4))
        assert node.device.num_enqueued == first
        node.host.opened(Opened(order.model_id, 3))
        node.host.opened(Opened(order.model_id, 4))
        assert node.device.num_enqueued > first
        assert run(node.host, NUM_TOKENS) == tiny.greedy(PROMPT, NUM_TOKENS)
        node.host.unload()
    assert node.device.mapped_bytes == 0


def test_a_model_may_be_unloaded_before_its_bytes_have_come(store, tiny):
    node = Node(store)
    node.host.load(node.order(tiny, num_groups=4, num_open=2))
    node.host.unload()
    assert node.device.mapped_bytes == 0
    assert node.serve(tiny)


@pytest.mark.parametrize("failing", ["reserve", "map", "copy"])
def test_a_load_that_the_device_refuses_leaves_a_worker_that_can_be_used(store, tiny, failing):
    node = Node(store, **{failing: 0})
    with pytest.raises((InternalError, UnavailableError), match=f"no {failing} today"):
        node.host.load(node.order(tiny))
    assert (node.host.engine, node.device.mapped_bytes) == (None, 0)
    assert not node.serve(tiny)


def test_a_wake_that_the_device_refuses_once_is_a_load(store, tiny):
    node = Node(store, map=1)
    node.serve(tiny)
    assert not node.serve(tiny)
    assert node.serve(tiny)


def test_a_copy_that_fails_later_is_told_and_ends_the_steps(store, tiny):
    node = Node(store, copy=4)
    node.host.load(node.order(tiny, num_groups=4, num_open=1))
    assert node.host.failure is None
    node.host.opened(Opened(tiny.spec.model_id, 4))
    assert "no copy today" in str(node.host.failure)
    with pytest.raises(InternalError, match="no copy today"):
        run(node.host, 1)
    node.host.unload()
    assert (node.device.regions, node.device.mapped_bytes) == ([], 0)
    assert not node.serve(tiny)


def test_a_pool_without_a_block_puts_the_model_back_to_sleep(store, tiny):
    node = Node(store)
    pool, node.host._kv_pool = node.host._kv_pool, torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(UnavailableError, match=r"engine\.kv_bytes"):
        node.host.load(node.order(tiny))
    assert node.device.mapped_bytes == 0
    node.host._kv_pool = pool
    assert node.serve(tiny)


def test_weights_that_changed_on_the_way_are_found_and_loaded_anew(store, tiny, tmp_path):
    node = Node(store, tmp_path / "references")
    node.serve(tiny)
    assert len(list((tmp_path / "references").iterdir())) == 1
    assert node.serve(tiny)
    node.host.load(node.order(tiny))
    run(node.host, 1)
    (region,) = node.device.regions
    region.bytes[3::64] ^= 0x40
    with pytest.raises(SelfCheckError, match="the weights on the device are not those"):
        node.host.check()
    node.host.unload()
    assert (node.device.regions, node.device.mapped_bytes) == ([], 0)
    assert not node.serve(tiny)


def test_a_check_is_made_once_and_only_when_all_bytes_are_there(store, tiny, tmp_path):
    node = Node(store, tmp_path / "references")
    node.host.load(node.order(tiny, num_groups=4, num_open=2))
    node.host.check()
    assert not (tmp_path / "references").exists()
    node.host.opened(Opened(tiny.spec.model_id, 4))
    run(node.host, 1)
    node.host.check()
    (reference,) = (tmp_path / "references").iterdir()
    reference.unlink()
    node.host.check()
    assert not reference.exists()
    node.host.unload()


def test_references_that_cannot_be_kept_end_nothing(store, tiny, tmp_path, caplog):
    (tmp_path / "references").write_text("a file")
    node = Node(store, tmp_path / "references")
    node.serve(tiny)
    assert "the self-check of tiny could not be made" in caplog.text


def test_another_dtype_is_made_on_the_device(store, tiny):
    node = Node(store)
    node.host._settings = EngineSettings(kv_bytes=1 * MIB, dtype="bfloat16")
    tokens = []
    for _ in range(2):
        node.host.load(node.order(tiny))
        tokens.append(run(node.host, NUM_TOKENS))
        node.host.unload()
    assert tokens[0] == tokens[1]
    assert node.device.calls.count("convert") > 0
