"""Replicas whose bytes are still on their way: they start, wait, fail and end as they should."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from tests.integration.node.nodes import (
    FAKE_WORKER,
    MIB,
    Bench,
    fake_model,
    job,
    make_settings,
    run,
    running_agent,
)
from tests.integration.node.tiny import make_tiny

from flashserve.config import Settings
from flashserve.errors import CheckpointError, ReplicaError
from flashserve.messages.events import (
    Evicted,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    Staged,
)
from flashserve.messages.work import TokenBatch
from flashserve.node.process import WORKER_COMMAND
from flashserve.store.arrival import Arrival, StageReport
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec, ReplicaId, Tier

NUM_GROUPS = 4


class HeldStore(Store):
    """The bytes are there, but say so only group by group, when the test opens them."""

    holds_back = True
    is_fetched = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.arrivals: list[Arrival] = []

    def hold(self, model: ModelSpec) -> Lease:
        lease = super().hold(model)
        lease.arrival.wait()
        if self.holds_back:
            report = StageReport(100, 0.0, 1.5)
            lease.arrival = Arrival(
                [1] * NUM_GROUPS, report=lambda _: report, is_fetched=self.is_fetched
            )
            self.arrivals.append(lease.arrival)
        return lease

    def open(self, num_groups: int) -> None:
        """So many more groups of the latest arrival."""
        for _ in range(num_groups):
            self.arrivals[-1].add(self.arrivals[-1].num_open, 1)


@contextlib.asynccontextmanager
async def held_back(
    settings: Settings, worker_command: Sequence[str] = FAKE_WORKER
) -> AsyncIterator[tuple[Bench, HeldStore]]:
    node = settings.node
    store = HeldStore(settings.data_dir, node.dram_bytes, node.prefault, settings.store)
    async with running_agent(settings, worker_command, store) as bench:
        yield bench, store


def test_a_replica_is_ready_before_its_bytes_and_answers_after_them(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            ready = await bench.started("m#1", fake_model(tmp_path, "m"))
            assert ready.phases.fetch_s == 0
            assert bench.events.of(Staged) == []
            answers = [asyncio.create_task(bench.tokens("m#1", job(f"s{n}", 3))) for n in range(2)]
            store.open(NUM_GROUPS - 1)
            assert (await bench.node.stats()).replicas == {}  # it may be waiting, and is not asked
            assert not any(answer.done() for answer in answers)
            store.open(1)
            for answer in answers:
                assert await answer == [1000, 1001, 1002]
            (staged,) = bench.events.of(Staged)
            assert (staged.tier, staged.num_bytes, staged.seconds) == (Tier.DRAM, 100, 1.5)
            assert len((await bench.node.stats()).replicas) == 1

    run(check())


def test_a_first_token_says_how_long_it_waited(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            await bench.started("m#1", fake_model(tmp_path, "m"))

            async def read(name: str) -> list[TokenBatch]:
                return [batch async for batch in bench.node.generate(ReplicaId("m#1"), job(name))]

            reading = asyncio.create_task(read("first"))
            while (await asyncio.sleep(0.01)) or store.arrivals[-1].num_open < NUM_GROUPS:
                store.open(1)
            batches = await reading
            assert batches[0].waited_s > 0
            assert all(batch.waited_s == 0 for batch in batches[1:])
            assert (await read("second"))[0].waited_s == 0

    run(check())


def test_a_real_worker_says_the_same_as_ever(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        tiny = make_tiny(tmp_path, "tiny")
        settings = make_settings(tmp_path, kv_bytes=1 * MIB)
        async with held_back(settings, WORKER_COMMAND) as (bench, store):
            await bench.started("t#1", tiny.spec)
            answer = asyncio.create_task(bench.tokens("t#1", job("s", 20)))
            store.open(NUM_GROUPS - 1)
            assert (await bench.node.stats()).replicas == {}
            assert not answer.done()
            store.open(1)
            assert await answer == tiny.greedy([1, 2, 3], 20)
            assert await bench.tokens("t#1", job("again", 20)) == tiny.greedy([1, 2, 3], 20)
            await stop(bench, "t#1", tiny.spec)
            store.holds_back = False
            await bench.started("t#2", tiny.spec)
            assert await bench.tokens("t#2", job("s", 20)) == tiny.greedy([1, 2, 3], 20)

    run(check())


async def stop(bench: Bench, replica: str, model: ModelSpec) -> None:
    bench.stop(replica, model)
    await bench.events.next(ReplicaStopped, replica_id=replica)


@pytest.mark.parametrize("num_open", range(NUM_GROUPS))
def test_bytes_that_never_come_end_the_streams_with_the_reason(
    tmp_path: pathlib.Path, num_open: int
) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            pids = bench.worker_pids()
            answer = asyncio.create_task(bench.tokens("m#1", job("s")))
            await asyncio.sleep(0)
            store.open(num_open)
            store.arrivals[-1].fail(CheckpointError("m.safetensors is damaged"))
            with pytest.raises(CheckpointError, match=r"m\.safetensors is damaged"):
                await answer
            lost = await bench.events.next(ReplicaLost)
            assert "m.safetensors is damaged" in lost.reason
            await bench.events.next(Evicted, model_id="m", tier=Tier.DRAM)
            with pytest.raises(ReplicaError):
                await bench.tokens("m#1", job("late"))
            store.holds_back = False
            await bench.started("m#2", model)
            assert await bench.tokens("m#2", job("s", 1)) == [1000]
            assert bench.worker_pids() == pids
            assert bench.num_leases() == 1
            assert bench.events.of(ReplicaFailed) == bench.events.of(ReplicaStopped) == []

    run(check())


def test_a_failure_before_there_is_a_worker_fails_the_start(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            a, b = fake_model(tmp_path, "a"), fake_model(tmp_path, "b")
            await bench.started("a#1", a)
            bench.start("b#1", b)
            await bench.until(lambda: len(store.arrivals) == 2)
            store.arrivals[1].fail(CheckpointError("b is damaged"))
            failed = await bench.events.next(ReplicaFailed, replica_id="b#1")
            assert (failed.code, failed.message) == ("bad_checkpoint", "b is damaged")
            await bench.until(lambda: bench.num_leases() == 1)

    run(check())


def test_a_worker_that_is_killed_while_bytes_arrive_is_replaced(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            answer = asyncio.create_task(bench.tokens("m#1", job("s")))
            store.open(1)
            (pid,) = bench.worker_pids()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ReplicaError):
                await answer
            await bench.events.next(ReplicaLost, replica_id="m#1")
            store.open(NUM_GROUPS - 1)  # nobody waits for them any more
            assert (await bench.events.next(Staged)).num_bytes == 100
            store.holds_back = False
            await bench.started("m#2", model)
            assert await bench.tokens("m#2", job("s", 1)) == [1000]
            assert bench.num_leases() == 1

    run(check())


def test_a_replica_can_be_stopped_while_a_request_waits_for_bytes(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            pids = bench.worker_pids()
            answer = asyncio.create_task(bench.tokens("m#1", job("s")))
            await asyncio.sleep(0)
            store.open(2)
            await stop(bench, "m#1", model)
            with pytest.raises(ReplicaError):
                await answer
            assert bench.num_leases() == 0
            store.holds_back = False
            await bench.started("m#2", model)
            assert await bench.tokens("m#2", job("s", 1)) == [1000]
            assert bench.worker_pids() == pids

    run(check())


@pytest.mark.parametrize("is_held", [False, True])
def test_bytes_that_arrive_after_their_replica_was_stopped_are_told(
    tmp_path: pathlib.Path, is_held: bool
) -> None:
    """They stay in DRAM, so the controller must count them; not held: it never got its lease."""

    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            model = fake_model(tmp_path, "m")
            bench.start("m#1", model)
            if is_held:
                await bench.events.next(ReplicaReady)
            else:
                await bench.until(lambda: bool(store.arrivals))
            await stop(bench, "m#1", model)
            await bench.until(lambda: bench.num_leases() == 0)
            assert bench.events.of(Staged) == []
            store.open(NUM_GROUPS)
            staged = await bench.events.next(Staged)
            assert (staged.model_id, staged.tier, staged.num_bytes) == ("m", Tier.DRAM, 100)

    run(check())


def test_bytes_that_were_evicted_or_failed_after_a_stop_are_not_told_to_be_there(
    tmp_path: pathlib.Path,
) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            model = fake_model(tmp_path, "m")
            for replica in ("m#1", "m#2"):
                await bench.started(replica, model)
                await stop(bench, replica, model)
                bench.evict(model)
                await bench.events.next(Evicted)
                if replica == "m#1":
                    store.open(NUM_GROUPS)
                    for _ in range(3):  # the news, their future, and who follows that
                        await asyncio.sleep(0)
                else:
                    store.arrivals[-1].fail(CheckpointError("m is damaged"))
                    await bench.events.next(Evicted, model_id="m", tier=Tier.DRAM)
            assert bench.events.of(Staged) == []

    run(check())


def test_who_waits_for_bytes_from_far_is_told_so(tmp_path: pathlib.Path) -> None:
    """Also who came when the replica was ready; its agent knows, not its worker."""

    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            store.is_fetched = True
            await bench.started("m#1", fake_model(tmp_path, "m"))

            async def read() -> list[TokenBatch]:
                return [batch async for batch in bench.node.generate(ReplicaId("m#1"), job("s"))]

            reading = asyncio.create_task(read())
            while (await asyncio.sleep(0.01)) or store.arrivals[-1].num_open < NUM_GROUPS:
                store.open(1)
            batches = await reading
            assert [batch.is_fetched for batch in batches] == [
                batch.waited_s > 0 for batch in batches
            ]
            assert batches[0].is_fetched

    run(check())


def test_a_reader_that_leaves_while_bytes_arrive_holds_up_nobody(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            await bench.started("m#1", fake_model(tmp_path, "m"))
            leaver = asyncio.create_task(bench.tokens("m#1", job("leaves", 100_000)))
            await asyncio.sleep(0)
            leaver.cancel()
            await asyncio.wait((leaver,))
            answer = asyncio.create_task(bench.tokens("m#1", job("stays", 2)))
            store.open(NUM_GROUPS)
            assert await answer == [1000, 1001]
            while (stats := await bench.node.stats()).replicas[ReplicaId("m#1")].num_running:
                pass
            assert stats.replicas[ReplicaId("m#1")].kv.used == 0

    run(check())


def test_without_overlap_a_replica_waits_for_its_bytes(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        settings = make_settings(tmp_path)
        whole = settings.store.model_copy(update={"execute_while_loading": False})
        settings = settings.model_copy(update={"store": whole})
        async with held_back(settings) as (bench, store):
            bench.start("m#1", fake_model(tmp_path, "m"))
            await bench.ready(1)
            await bench.until(lambda: bool(store.arrivals))
            store.open(NUM_GROUPS - 1)
            assert bench.events.of(ReplicaReady) == []
            store.open(1)
            ready = await bench.events.next(ReplicaReady)
            assert ready.phases.dram_s == 1.5

    run(check())


def test_a_node_that_closes_while_bytes_arrive_leaves_nothing(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, _):
            await bench.started("m#1", fake_model(tmp_path, "m"))
            answer = asyncio.create_task(bench.tokens("m#1", job("s")))
            await asyncio.sleep(0)
        with pytest.raises(ReplicaError):
            await answer

    run(check())


def test_damaged_bytes_end_the_replicas_that_use_them(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path, num_workers=2)) as (bench, store):
            store.holds_back = False
            a = fake_model(tmp_path, "a", step_s=0.001)
            b = fake_model(tmp_path, "b", num_bytes=300)
            await bench.started("a#1", a)
            await bench.started("b#1", b)
            batches = bench.node.generate(ReplicaId("a#1"), job("s", 100_000))
            await anext(batches)
            assert store.listener is not None
            store.listener.damaged((ModelId("a"),), "a is damaged between its bytes 0 and 9")
            with pytest.raises(ReplicaError):
                async for _ in batches:
                    pass
            (lost,) = bench.events.of(ReplicaLost)
            assert (lost.replica_id, "between its bytes 0 and 9" in lost.reason) == ("a#1", True)
            await bench.events.next(Evicted, model_id="a", tier=Tier.DRAM)
            await bench.started("a#2", a)
            assert await bench.tokens("b#1", job("s", 1)) == [1000]
            assert bench.num_leases() == 2

    run(check())


def test_what_the_disk_tier_does_by_itself_is_told(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with held_back(make_settings(tmp_path)) as (bench, store):
            assert store.listener is not None
            await asyncio.to_thread(store.listener.on_disk, ModelId("m"), 300, 2.5)
            staged = await bench.events.next(Staged)
            assert (staged.model_id, staged.tier, staged.num_bytes) == ("m", Tier.DISK, 300)
            assert staged.seconds == 2.5
            await asyncio.to_thread(store.listener.left_disk, ModelId("m"))
            await bench.events.next(Evicted, model_id="m", tier=Tier.DISK)

    run(check())
