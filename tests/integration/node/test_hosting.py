"""What a worker does with tensors, in this process."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

import pytest
import torch
from tests.integration.node.nodes import MIB, job
from tests.integration.node.tiny import Tiny, change_config, make_tiny

from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.errors import CheckpointError, ConflictError, DeployError
from flashserve.messages.work import DescribeModel, LoadModel, Prepare
from flashserve.node import hosting
from flashserve.node.hosting import ModelHost, Skeletons
from flashserve.store.dram.arena import attach
from flashserve.store.store import Lease, Store
from flashserve.types import Tier


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    store = Store(tmp_path, 8 * MIB, prefault=False)
    yield store
    store.close()


@pytest.fixture
def host(store: Store) -> ModelHost:
    arena = attach(store.arena.fd, store.arena.num_bytes)
    return ModelHost(arena, EngineSettings(kv_bytes=1 * MIB))


def leased(store: Store, tiny: Tiny) -> Lease:
    store.stage(tiny.spec, Tier.DRAM)
    return store.lease(tiny.spec.model_id)


def load_order(lease: Lease) -> LoadModel:
    snapshot = lease.snapshot
    return LoadModel(lease.model_id, snapshot.config, snapshot.generation_config, lease.tensors)


def run(host: ModelHost, num_tokens: int) -> list[int]:
    assert host.engine is not None
    host.engine.add(job("s", num_tokens))
    tokens = []
    while host.engine.has_work:
        tokens += [output.token_id for _, output in host.engine.step()]
    return tokens


def test_models_follow_each_other_in_one_host(host: ModelHost, store: Store, tiny: Tiny) -> None:
    expected = tiny.greedy([1, 2, 3], 20)
    for _ in range(3):
        with leased(store, tiny) as lease:
            report = host.load(load_order(lease))
            assert report.kv.free == report.kv.total > 0
            assert run(host, 20) == expected
            host.unload()
            while host.work_ahead():
                pass
        assert host.engine is None


def test_a_second_model_is_refused(host: ModelHost, store: Store, tiny: Tiny) -> None:
    with leased(store, tiny) as lease:
        host.load(load_order(lease))
        with pytest.raises(ConflictError):
            host.load(load_order(lease))
        host.unload()


def test_a_failed_load_leaves_the_host_empty(host: ModelHost, store: Store, tiny: Tiny) -> None:
    with leased(store, tiny) as lease:
        order = load_order(lease)
        broken = LoadModel(order.model_id, order.config, {}, order.tensors[1:])
        with pytest.raises(CheckpointError, match=order.tensors[0].name):
            host.load(broken)
        assert host.engine is None
        host.load(order)
        host.unload()


def test_a_hint_builds_the_module_that_the_next_load_takes(
    host: ModelHost, store: Store, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with leased(store, tiny) as lease:
        order = load_order(lease)
        host.prepare(Prepare(((lease.offset, lease.num_bytes),), order.config, order.tensors))
        while host.work_ahead():
            pass
        monkeypatch.setattr(hosting, "build_skeleton", None)  # a call of it would raise
        host.load(order)
        assert run(host, 5) == tiny.greedy([1, 2, 3], 5)
        host.unload()


def test_a_hint_of_no_use_is_dropped(host: ModelHost, store: Store, tiny: Tiny) -> None:
    with leased(store, tiny) as lease:
        order = load_order(lease)
        host.prepare(Prepare(((0, 1 << 40),), {"architectures": ["Unheard"]}, order.tensors))
        host.prepare(Prepare((), order.config, ()))
        while host.work_ahead():
            pass
        host.load(order)
        host.unload()


def test_a_skeleton_is_taken_once_and_only_the_latest_are_kept(tiny: Tiny) -> None:
    config = json.loads((pathlib.Path(tiny.spec.source) / "config.json").read_text())
    skeletons = Skeletons()
    skeletons.build(config, torch.float32)
    taken = skeletons.take(config, torch.float32)
    assert skeletons.take(config, torch.float32) is not taken
    for size in range(hosting._MAX_SKELETONS + 1):
        skeletons.build({**config, "vocab_size": 100 + size}, torch.float32)
    assert len(skeletons._built) == hosting._MAX_SKELETONS


def test_describing_refuses_what_would_not_be_served(
    host: ModelHost, store: Store, tmp_path: pathlib.Path
) -> None:
    odd = make_tiny(tmp_path, "odd", seed=1)
    change_config(odd.spec, num_hidden_layers=3)
    snapshot = store.inspect(odd.spec.source)
    with leased(store, odd) as lease, pytest.raises(DeployError, match=r"layers\.2"):
        host.describe(DescribeModel(snapshot.config, lease.tensors))


def test_settings_may_ask_for_another_dtype(store: Store, tiny: Tiny) -> None:
    arena = attach(store.arena.fd, store.arena.num_bytes)
    host = ModelHost(arena, EngineSettings(kv_bytes=1 * MIB, dtype="bfloat16"))
    with leased(store, tiny) as lease:
        assert loading.choose_dtype("auto", lease.tensors) == torch.float32
        host.load(load_order(lease))
        assert len(run(host, 4)) == 4
        host.unload()
