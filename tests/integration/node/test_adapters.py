"""A node stages adapters when they are asked for, tells workers, and takes them back."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
from tests.adapters import Q0, linear, write_adapter, write_base
from tests.integration.node.nodes import (
    Bench,
    fake_model,
    job,
    make_settings,
    run,
    running_node,
)

from flashserve.config import StoreSettings
from flashserve.errors import (
    CheckpointError,
    ModelNotFoundError,
    ReplicaError,
    UnavailableError,
)
from flashserve.messages.work import AdapterImage, DropAdapter
from flashserve.node.adapters import Adapters
from flashserve.store.store import Store
from flashserve.types import AdapterId, AdapterSpec, ModelId, ModelSpec, Tier

MIB = 1 << 20
KIB = 1 << 10


class FakeWorker:
    """Records what it is told; `drop` waits until it may be answered."""

    name = "fake"
    is_alive = True

    def __init__(self) -> None:
        self.channel = self
        self.process = self
        self.known: dict[AdapterId, AdapterImage] = {}
        self.frames: list[str] = []
        """What was sent, in order."""
        self.prefetched: list[AdapterId] = []
        self.dropped: list[AdapterId] = []
        self.damaged: list[AdapterId] = []
        self.error: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.was_killed = False

    def notify(self, method: str, body: Any) -> None:
        self.frames.append(method)
        if method == "adapter":
            self.known[body.adapter_id] = body
        else:
            assert method == "prefetch"
            assert body in self.known
            self.prefetched.append(body)

    def ask(
        self, method: str, body: DropAdapter, kind: object, timeout_s: float
    ) -> Coroutine[Any, Any, None]:
        assert method == "drop"
        self.frames.append(method)
        return self._drop(body)

    async def _drop(self, body: DropAdapter) -> None:
        await self.may_answer.wait()
        if self.error:
            raise self.error
        if self.frames[-1] == "drop":
            self.known.pop(body.adapter_id, None)
        (self.damaged if body.is_damaged else self.dropped).append(body.adapter_id)

    async def wait_gone(self) -> None: ...

    def kill(self) -> None:
        self.was_killed = True


@dataclasses.dataclass
class Desk:
    """Adapters over a real store, and directories to fill it with."""

    adapters: Adapters
    store: Store
    base: ModelSpec
    directory: Path

    def __post_init__(self) -> None:
        self.worker: Any = FakeWorker()

    async def register(self, name: str, kib: int = 60, version: int = 1) -> AdapterSpec:
        rank = kib * KIB // (2 * 32 * 4)
        directory = self.directory / f"{name}{version}"
        write_adapter(directory, linear(Q0, rank, 32, 32, hash(name) % 1000), rank=rank)
        facts = await self.adapters.describe(str(directory), self.base)
        spec = AdapterSpec(
            name, version, self.base.model_id, str(directory), facts.size_bytes, facts.identity
        )
        self.adapters.declare(spec)
        return spec

    def use(self, spec: AdapterSpec) -> contextlib.AbstractAsyncContextManager[None]:
        return self.adapters.use(spec.adapter_id, lambda: self.worker)

    async def used(self, spec: AdapterSpec) -> None:
        async with self.use(spec):
            pass

    async def tier(self, spec: AdapterSpec) -> Tier:
        return (await self.adapters.residences())[spec.adapter_id].tier

    async def until(self, fact: Any) -> None:
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def desk(directory: Path) -> AsyncIterator[Desk]:
    base = ModelSpec(ModelId("base"), str(write_base(directory / "base")), 1)
    settings = StoreSettings(scrub_bytes_per_s=0)
    store = Store(
        directory / "data", 4 * MIB, False, settings, adapter_bytes=2 * MIB, max_lora_rank=16384
    )
    adapters = Adapters(store.adapters)
    try:
        yield Desk(adapters, store, base, directory)
    finally:
        adapters.retire_all()
        await adapters.close()
        store.close()


def test_a_worker_is_told_once_and_the_bytes_stay(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            async with d.use(spec), d.use(spec):
                image = d.worker.known[spec.adapter_id]
                assert [layer.module for layer in image.layers] == [Q0]
                residence = (await d.adapters.residences())[spec.adapter_id]
                assert (residence.tier, residence.num_users) == (Tier.DRAM, 2)
            await d.used(spec)
            assert d.worker.known == {spec.adapter_id: image}
            assert d.store.adapters._shelf.whole(ModelId(spec.identity)).leases.total() == 1

    run(check())


def test_requests_at_once_share_one_read(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            d.adapters.prefetch(spec.adapter_id)
            await asyncio.gather(*(d.used(spec) for _ in range(8)))
            assert d.store.adapters.usage().used == 64 * KIB
            assert await d.tier(spec) is Tier.DRAM

    run(check())


def test_an_adapter_that_nobody_asked_for_costs_nothing(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            for number in range(1000):
                d.adapters.declare(dataclasses.replace(spec, name=f"n{number}"))
            await d.until(lambda: not d.store.adapters.usage().used)
            assert len(await d.adapters.residences()) == 1001

    run(check())


def test_prefetched_bytes_are_there_and_not_held(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            d.adapters.prefetch(spec.adapter_id)
            d.adapters.prefetch(AdapterId("unknown@1"))
            while await d.tier(spec) is not Tier.DRAM:
                pass
            assert d.worker.known == {}
            await d.until(lambda: not d.adapters._tasks)
            assert d.store.adapters._shelf.whole(ModelId(spec.identity)).leases.total() == 0

    run(check())


def test_one_that_is_expected_is_loaded_by_the_workers_of_its_base(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            asked: list[ModelId] = []

            def serving(base: ModelId) -> list[Any]:
                asked.append(base)
                return [d.worker]

            for _ in range(2):
                d.adapters.prefetch(spec.adapter_id, serving)
            d.adapters.prefetch(AdapterId("unknown@1"), serving)
            await d.until(lambda: not d.adapters._tasks)
            assert asked == [d.base.model_id] * 2
            assert d.worker.frames == ["adapter", "prefetch", "prefetch"]
            assert (await d.adapters.residences())[spec.adapter_id].num_users == 0
            await d.used(spec)
            assert d.worker.frames.count("adapter") == 1
            d.adapters.prefetch(spec.adapter_id, serving)
            d.adapters.retire(spec.adapter_id)
            await d.until(lambda: not d.adapters._tasks)
            assert d.worker.known == {}
            await d.until(lambda: not d.store.adapters.usage().used)

    run(check())


def test_one_that_is_expected_and_cannot_be_read_is_told_to_who_uses_it(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            write_adapter(Path(spec.source), seed=99)
            d.adapters.prefetch(spec.adapter_id, lambda _: [d.worker])
            await d.until(lambda: not d.adapters._tasks)
            assert d.worker.frames == []
            with pytest.raises(CheckpointError, match="add it again"):
                await d.used(spec)

    run(check())


def test_who_uses_one_while_it_is_taken_back_tells_the_worker_after_the_drop(
    tmp_path: Path,
) -> None:
    """Also in the very turn of the loop in which it is taken back."""

    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            await d.used(spec)
            await d.used(spec)
            taking = asyncio.create_task(
                d.adapters._take_back(d.adapters._adapters[spec.adapter_id])
            )
            using = asyncio.create_task(d.used(spec))
            await asyncio.gather(taking, using)
            assert d.worker.frames == ["adapter", "drop", "adapter"]
            assert set(d.worker.known) == {spec.adapter_id}

    run(check())


def test_under_pressure_unused_ones_are_taken_back_from_workers(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            specs = [await d.register(name, 500) for name in "abc"]
            async with d.use(specs[0]):
                await d.used(specs[1])
                await d.used(specs[2])
                more = [await d.register(name, 500) for name in "defg"]
                for spec in more:
                    await d.used(spec)
                assert specs[0].adapter_id in d.worker.known
                assert d.worker.dropped[:2] == [specs[1].adapter_id, specs[2].adapter_id]
            again = d.worker.known.pop(specs[0].adapter_id)
            assert again.layers
            await d.used(specs[1])
            assert specs[1].adapter_id in d.worker.known

    run(check())


def test_bytes_stay_until_the_worker_has_answered(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            first, second = await d.register("a", 900), await d.register("b", 900)
            await d.used(first)
            await d.used(second)
            d.worker.may_answer.clear()
            coming = asyncio.create_task(d.register("c", 900))
            await d.until(lambda: d.adapters._adapters[first.adapter_id].lease is None)
            assert d.store.adapters._shelf.whole(ModelId(first.identity)).leases.total() == 1
            d.worker.may_answer.set()
            third = await coming
            assert d.worker.dropped == [first.adapter_id]
            await d.used(third)

    run(check())


def test_when_all_are_in_use_the_next_is_told_so(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            specs = [await d.register(name, 900) for name in "abc"]
            async with d.use(specs[0]), d.use(specs[1]):
                with pytest.raises(UnavailableError, match="no room"):
                    await d.used(specs[2])
            await d.used(specs[2])
            assert d.worker.dropped == [specs[0].adapter_id]

    run(check())


def test_a_retired_one_leaves_with_its_last_user(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            async with d.use(spec):
                d.adapters.retire(spec.adapter_id)
                d.adapters.retire(AdapterId("unknown@1"))
                await asyncio.sleep(0)
                assert d.worker.dropped == []
            await d.until(lambda: not d.adapters._tasks)
            assert d.worker.dropped == [spec.adapter_id]
            await d.until(lambda: not d.store.adapters.usage().used)
            with pytest.raises(ModelNotFoundError, match="a@1 is not registered"):
                await d.used(spec)

    run(check())


def test_two_versions_are_served_side_by_side(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            old, new = await d.register("a", 60), await d.register("a", 120, version=2)
            async with d.use(old):
                d.adapters.retire(old.adapter_id)
                async with d.use(new):
                    assert set(d.worker.known) == {old.adapter_id, new.adapter_id}
            await d.until(lambda: not d.adapters._tasks)
            assert set(d.worker.known) == {new.adapter_id}

    run(check())


def test_equal_content_stays_for_the_version_that_remains(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            first = await d.register("a")
            second = dataclasses.replace(first, version=2)
            d.adapters.declare(second)
            d.adapters.retire(first.adapter_id)
            await d.until(lambda: not d.adapters._tasks)
            assert await d.tier(second) is Tier.DRAM
            d.adapters.retire(second.adapter_id)
            await d.until(lambda: not d.adapters._tasks)
            await d.until(lambda: not d.store.adapters.usage().used)

    run(check())


def test_a_worker_that_dies_is_told_no_more_and_its_bytes_are_free(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            await d.used(spec)
            dead, d.worker = d.worker, FakeWorker()
            d.adapters.forgotten_by(dead)
            assert d.store.adapters._shelf.whole(ModelId(spec.identity)).leases.total() == 0
            await d.used(spec)
            assert set(d.worker.known) == {spec.adapter_id}

    run(check())


@pytest.mark.parametrize("error", [ReplicaError("it ended"), UnavailableError("no answer")])
def test_a_worker_that_does_not_drop_does_not_keep_the_bytes(
    tmp_path: Path, error: Exception
) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            await d.used(spec)
            d.worker.error = error
            d.adapters.retire(spec.adapter_id)
            await d.until(lambda: not d.adapters._tasks)
            assert d.worker.was_killed != isinstance(error, ReplicaError)
            await d.until(lambda: not d.store.adapters.usage().used)

    run(check())


def test_a_replica_that_ends_meanwhile_is_told_to_the_request(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")

            def ended() -> Any:
                raise ReplicaError("replica r is not ready")

            with pytest.raises(ReplicaError, match="not ready"):
                async with d.adapters.use(spec.adapter_id, ended):
                    pass
            assert (await d.adapters.residences())[spec.adapter_id].num_users == 0

    run(check())


def test_a_changed_source_is_told_to_every_request(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.store.adapters.forget(spec.identity)
            write_adapter(Path(spec.source), seed=99)
            d.adapters.prefetch(spec.adapter_id)
            failed = await asyncio.gather(*(d.used(spec) for _ in range(3)), return_exceptions=True)
            assert [type(error) for error in failed] == [CheckpointError] * 3
            assert all("add it again" in str(error) for error in failed)

    run(check())


def test_damaged_bytes_are_read_anew_for_the_next_request(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            async with d.use(spec):
                before = d.worker.known[spec.adapter_id]
                d.store.arena._view[before.layers[0].a.offset] ^= 1
                image = d.store.adapters._shelf.whole(ModelId(spec.identity))
                with pytest.raises(CheckpointError):
                    d.store.adapters._guard.verify(image)
                await d.until(lambda: d.worker.damaged)
            assert d.worker.dropped == []
            await d.used(spec)
            assert d.worker.known[spec.adapter_id].layers
            d.store.adapters._guard.verify(d.store.adapters._shelf.whole(ModelId(spec.identity)))

    run(check())


def test_who_copied_bytes_before_they_were_found_damaged_is_told_also_after_a_drop(
    tmp_path: Path,
) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec, large = await d.register("a"), await d.register("b", 1900)
            await d.used(spec)
            assert d.worker.known
            await d.adapters._take_back(d.adapters._adapters[spec.adapter_id])
            gone, d.worker = d.worker, FakeWorker()
            await d.used(large)
            d.adapters._damaged((spec.identity,), "damaged")
            await d.until(lambda: not d.adapters._tasks)
            assert (gone.dropped, gone.damaged) == ([spec.adapter_id], [spec.adapter_id])
            assert (d.worker.dropped, d.worker.damaged) == ([], [])
            d.adapters._damaged((spec.identity,), "damaged")  # told once
            await d.until(lambda: not d.adapters._tasks)
            assert len(gone.damaged) == 1

    run(check())


def test_a_hit_waits_for_no_thread(tmp_path: Path) -> None:
    async def check() -> None:
        async with desk(tmp_path) as d:
            spec = await d.register("a")
            d.adapters._executor.shutdown()  # whoever needed it would fail
            await d.used(spec)
            d.adapters.forgotten_by(d.worker)
            await d.used(spec)

    run(check())


def with_adapter(sequence_id: str, spec: AdapterSpec) -> Any:
    plain = job(sequence_id)
    return dataclasses.replace(plain, adapter_id=spec.adapter_id, salt=spec.adapter_id)


async def serve(bench: Bench, directory: Path) -> None:
    """Registers an adapter over a node and has three requests at once use it."""
    model = fake_model(directory, "m")
    await bench.ready(1)
    await bench.started("r", model)
    base = ModelSpec(ModelId("base"), str(write_base(directory / "base")), 1)
    source = str(write_adapter(directory / "a"))
    facts = await bench.node.describe_adapter(source, base)
    assert (facts.rank, facts.targets) == (4, ("q_proj",))
    wrong = write_adapter(directory / "wrong", linear(Q0, 4, 64, 64))
    with pytest.raises(CheckpointError, match="does not fit model base"):
        await bench.node.describe_adapter(str(wrong), base)
    spec = AdapterSpec("a", 1, base.model_id, source, facts.size_bytes, facts.identity)
    with pytest.raises(ModelNotFoundError):
        await bench.tokens("r", with_adapter("s0", spec))
    bench.node.declare_adapter(spec)
    bench.node.prefetch_adapter(spec.adapter_id, into_pages=True)
    jobs = [with_adapter(f"s{number}", spec) for number in range(1, 4)]
    answers = await asyncio.gather(*(bench.tokens("r", each) for each in jobs))
    assert answers == [[1000, 1001, 1002, 1003, 1004]] * 3
    residence = (await bench.node.stats()).adapters[spec.adapter_id]
    assert (residence.tier, residence.dram_bytes, residence.num_users) == (Tier.DRAM, 64 * KIB, 0)
    assert bench.node.spec.dram_bytes == 14 * MIB


@pytest.mark.parametrize("kind", ["in-process", "unix"])
def test_a_node_serves_adapters(tmp_path: Path, kind: str) -> None:
    async def check() -> None:
        settings = make_settings(tmp_path / "data", 1, 16 * MIB, 2 * MIB)
        async with running_node(kind, settings) as bench:
            await serve(bench, tmp_path)

    run(check())
