"""Adapters come into their zone of the arena, share it, and leave it, without touching models."""

from __future__ import annotations

import concurrent.futures
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.adapters import PREFIX, Q0, linear, write_adapter, write_base
from tests.integration.store import objectstore

from flashserve.config import StoreSettings
from flashserve.errors import (
    CheckpointError,
    DeployError,
    ModelTooLargeError,
    UnavailableError,
    UnsupportedModelError,
)
from flashserve.store.adapters.tier import AdapterLease
from flashserve.store.store import Store
from flashserve.types import AdapterSpec, ModelId, ModelSpec, Tier

MIB = 1 << 20
KIB = 1 << 10
EMBED = "model.embed_tokens"


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    stores: list[Store] = []

    def make(adapter_bytes: int = 2 * MIB) -> Store:
        settings = StoreSettings(scrub_bytes_per_s=0)
        store = Store(
            tmp_path / "data",
            8 * MIB,
            False,
            settings,
            adapter_bytes=adapter_bytes,
            max_lora_rank=16384,
        )
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def store(make_store: Callable[..., Store]) -> Store:
    return make_store()


@pytest.fixture
def base(tmp_path: Path) -> ModelSpec:
    return ModelSpec(ModelId("base"), str(write_base(tmp_path / "base")), 1)


def register(store: Store, base: ModelSpec, directory: Path, version: int = 1) -> AdapterSpec:
    found = store.adapters.admit(str(directory), base)
    return AdapterSpec(
        directory.name, version, base.model_id, found.uri, found.size_bytes, found.identity
    )


def dram_bytes(store: Store, spec: AdapterSpec) -> int:
    return store.adapters.where([spec])[spec.identity][1]


def wait_empty(store: Store) -> None:
    """What has just come is looked through once in the background, and goes after that."""
    until(lambda: not store.adapters.usage().used)


def until(fact: Callable[[], bool]) -> None:
    """For what no call waits for."""
    while not fact():
        time.sleep(0.001)


def wide(directory: Path, kib: int, seed: int = 0) -> Path:
    """An adapter of about so many KiB that fits the base."""
    rank = kib * KIB // (2 * 32 * 4)
    return write_adapter(directory, linear(Q0, rank, 32, 32, seed), rank=rank)


def read(store: Store, lease: AdapterLease, number: int = 0) -> np.ndarray:
    a = lease.layers[number].a
    with store.arena._view[a.offset : a.offset + a.num_bytes] as data:
        return np.frombuffer(bytes(data), np.float32).reshape(a.shape)


def test_a_registered_adapter_is_leased_where_its_bytes_are(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    spec = register(store, base, write_adapter(tmp_path / "a", seed=3))
    with store.adapters.hold(spec) as lease:
        assert [layer.module for layer in lease.layers] == [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.self_attn.q_proj",
        ]
        assert lease.layers[0].scaling == 2.0
        expected = linear(Q0, 4, 32, 32, 3)[f"{PREFIX}{Q0}.lora_A.weight"]
        np.testing.assert_array_equal(read(store, lease), expected)
        assert store.adapters.usage().used == 64 * KIB
        assert lease.layers[0].a.offset >= store.usage().total
    assert store.usage().used == 0


def test_registered_and_idle_costs_nothing(store: Store, base: ModelSpec, tmp_path: Path) -> None:
    spec = register(store, base, write_adapter(tmp_path / "a"))
    store.adapters.forget(spec.identity)
    wait_empty(store)
    assert store.adapters.lease(spec.identity) is None
    with store.adapters.hold(spec):
        assert store.adapters.where([spec]) == {spec.identity: (Tier.DRAM, 64 * KIB)}
    store.adapters.forget(spec.identity)
    assert store.adapters.where([spec]) == {spec.identity: (Tier.DISK, 0)}


def test_many_calls_share_one_read(store: Store, base: ModelSpec, tmp_path: Path) -> None:
    spec = register(store, base, write_adapter(tmp_path / "a"))
    store.adapters.forget(spec.identity)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        leases = list(pool.map(lambda _: store.adapters.hold(spec), range(16)))
    assert store.adapters.usage().used == 64 * KIB
    assert len({lease.layers for lease in leases}) == 1
    for lease in leases:
        lease.release()


def test_the_longest_unused_leaves_and_leased_ones_stay(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    first, second, third = (
        register(store, base, wide(tmp_path / name, 120, seed))  # up to 128 KiB with its header
        for seed, name in enumerate("abc")
    )
    adapters = store.adapters
    held = adapters.hold(second)
    adapters.hold(first).release()  # now the third is the longest unused
    for number in range(20):
        register(store, base, wide(tmp_path / f"more{number}", 120, 9 + number))
        if number < 14:
            assert dram_bytes(store, first)
    assert not dram_bytes(store, third)
    assert not dram_bytes(store, first)
    assert adapters.lease(second.identity) is not None
    assert adapters.usage().free == 0
    np.testing.assert_array_equal(
        read(store, held), linear(Q0, 480, 32, 32, 1)[f"{PREFIX}{Q0}.lora_A.weight"]
    )
    with adapters.hold(third) as again:
        expected = linear(Q0, 480, 32, 32, 2)[f"{PREFIX}{Q0}.lora_A.weight"]
        np.testing.assert_array_equal(read(store, again), expected)


def test_when_all_are_in_use_there_is_no_room(
    make_store: Callable[..., Store], base: ModelSpec, tmp_path: Path
) -> None:
    store = make_store()
    specs = [register(store, base, wide(tmp_path / f"{n}", 900, n)) for n in range(3)]
    leases = [store.adapters.hold(spec) for spec in specs[:2]]
    with pytest.raises(UnavailableError, match="no room"):
        store.adapters.hold(specs[2])
    leases[0].release()
    with store.adapters.hold(specs[2]):
        assert store.adapters.lease(specs[0].identity) is None


def test_an_adapter_larger_than_the_zone_is_refused(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(ModelTooLargeError, match=r"node\.adapter_bytes"):
        register(store, base, wide(tmp_path / "a", 3000))
    wait_empty(store)


def test_an_adapter_needs_a_zone(
    make_store: Callable[..., Store], base: ModelSpec, tmp_path: Path
) -> None:
    with pytest.raises(ModelTooLargeError, match=r"node\.adapter_bytes"):
        register(make_store(0), base, write_adapter(tmp_path / "a"))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused_and_nothing_stays(
    store: Store, base: ModelSpec, tmp_path: Path, bad: float
) -> None:
    tensors = linear(Q0, 4, 32, 32)
    tensors[f"{PREFIX}{Q0}.lora_B.weight"][31, 3] = bad
    with pytest.raises(CheckpointError, match=r"no finite numbers in .*q_proj\.lora_B"):
        register(store, base, write_adapter(tmp_path / "a", tensors))
    wait_empty(store)


def test_the_wrong_base_is_refused_and_nothing_is_read(store: Store, tmp_path: Path) -> None:
    base = ModelSpec(ModelId("wide"), str(write_base(tmp_path / "wide", 64)), 1)
    with pytest.raises(CheckpointError, match=r"does not fit model wide: .* 64 x 64 there"):
        register(store, base, write_adapter(tmp_path / "a"))
    wait_empty(store)


def test_a_changed_source_must_be_added_again(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    spec = register(store, base, write_adapter(tmp_path / "a"))
    write_adapter(tmp_path / "a", seed=7, rank=8)
    with store.adapters.hold(spec) as lease:  # what was registered is in DRAM, and right
        assert lease.layers[0].a.shape == (4, 32)
    store.adapters.forget(spec.identity)
    with pytest.raises(CheckpointError, match="has changed since it was added: add it again"):
        store.adapters.hold(spec)
    again = register(store, base, tmp_path / "a", version=2)
    with store.adapters.hold(again) as lease:
        assert lease.layers[0].a.shape == (8, 32)


def test_a_source_that_has_gone_is_named(store: Store, base: ModelSpec, tmp_path: Path) -> None:
    spec = register(store, base, write_adapter(tmp_path / "a"))
    store.adapters.forget(spec.identity)
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(DeployError, match="does not exist"):
        store.adapters.hold(spec)


def embedding_adapter(directory: Path, copy: np.ndarray) -> Path:
    tensors = {
        f"{PREFIX}{EMBED}.lora_embedding_A": np.zeros((4, 50), np.float32),
        f"{PREFIX}{EMBED}.lora_embedding_B": np.zeros((32, 4), np.float32),
        f"{PREFIX}{EMBED}.base_layer.weight": copy,
    }
    return write_adapter(directory, tensors, target_modules=["embed_tokens"])


def test_a_copy_of_the_bases_embedding_is_compared(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)  # as in write_base
    _, _, embedding = (rng.normal(size=shape).astype("f4") for shape in [(32, 32)] * 2 + [(50, 32)])
    register(store, base, embedding_adapter(tmp_path / "a", embedding))
    embedding[49, 31] += 1
    with pytest.raises(UnsupportedModelError, match="that are not its base's"):
        register(store, base, embedding_adapter(tmp_path / "b", embedding))


def test_damage_in_dram_is_told_and_read_again(
    make_store: Callable[..., Store], base: ModelSpec, tmp_path: Path
) -> None:
    store = make_store()
    damaged: list[tuple[str, ...]] = []
    store.adapters.on_damage = lambda identities, _: damaged.append(identities)
    spec = register(store, base, write_adapter(tmp_path / "a"))
    with store.adapters.hold(spec) as lease:
        store.arena._view[lease.layers[0].a.offset] ^= 1
        with pytest.raises(CheckpointError, match="in DRAM is damaged"):
            store.adapters._guard.verify(lease.image)
    assert damaged == [(spec.identity,)]
    assert store.adapters.lease(spec.identity) is None
    with store.adapters.hold(spec) as lease:
        expected = linear(Q0, 4, 32, 32)[f"{PREFIX}{Q0}.lora_A.weight"]
        np.testing.assert_array_equal(read(store, lease), expected)


def test_equal_adapters_of_two_names_are_in_dram_once(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    directory = write_adapter(tmp_path / "a")
    first, second = (register(store, base, directory, version) for version in (1, 2))
    with store.adapters.hold(first), store.adapters.hold(second):
        assert store.adapters.usage().used == 64 * KIB


def test_an_adapter_of_an_object_store_comes_to_disk_and_stays_when_the_store_has_gone(
    make_store: Callable[..., Store],
    base: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bucket = tmp_path / "buckets" / "adapters"
    write_adapter(bucket / "a")
    (bucket / "a" / "tokenizer.json").write_text("{}")
    (bucket / "a" / "optimizer.pt").write_bytes(b"pickled")
    uri = "s3://adapters/a"
    with objectstore.serving(tmp_path / "buckets", tmp_path / "server.log") as endpoint:
        objectstore.configure(monkeypatch, endpoint, tmp_path)
        store = make_store()
        found = store.adapters.admit(uri, base)
        assert sorted(path.name for path in found.directory.iterdir()) == ["adapter_config.json"]
        spec = AdapterSpec("a", 1, base.model_id, uri, found.size_bytes, found.identity)
        until(lambda: store.adapters.where([spec])[found.identity][0] is Tier.DRAM)
        store.adapters.forget(found.identity)
        until(lambda: store.adapters.where([spec])[found.identity] == (Tier.DISK, 0))
        store.close()
    store = make_store()
    with store.adapters.hold(spec) as lease:
        expected = linear(Q0, 4, 32, 32)[f"{PREFIX}{Q0}.lora_A.weight"]
        np.testing.assert_array_equal(read(store, lease), expected)
    assert store._reporter.report().disk.num_models == 1


def test_an_object_that_was_replaced_must_be_added_again(
    make_store: Callable[..., Store],
    base: ModelSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_adapter(tmp_path / "buckets" / "adapters" / "a")
    uri = "s3://adapters/a"
    with objectstore.serving(tmp_path / "buckets", tmp_path / "server.log") as endpoint:
        objectstore.configure(monkeypatch, endpoint, tmp_path)
        store = make_store()
        found = store.adapters.admit(uri, base)
        spec = AdapterSpec("a", 1, base.model_id, uri, found.size_bytes, found.identity)
        store.adapters.forget(found.identity)
        until(lambda: store.adapters.where([spec])[found.identity] == (Tier.DISK, 0))
        write_adapter(tmp_path / "buckets" / "adapters" / "a", seed=5, rank=8)
        store.adapters.hold(spec).release()  # the version that was added is on disk
        store.adapters.forget(found.identity)
        wait_empty(store)
        store._origins.disk.evict(found.identity)
        with pytest.raises(CheckpointError, match="add it again"):
            store.adapters.hold(spec)
