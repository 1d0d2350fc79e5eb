"""A node carries out orders; the same through an agent in this process and through a socket."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib

import pytest
from tests.integration.node.nodes import (
    MIB,
    fake_model,
    job,
    make_settings,
    run,
    running_node,
)

from flashserve.errors import (
    ContextLengthError,
    InternalError,
    ReplicaError,
    SourceError,
)
from flashserve.messages.events import (
    Evicted,
    ReplicaFailed,
    ReplicaReady,
    ReplicaStopped,
    Staged,
    StageFailed,
)
from flashserve.node import describing
from flashserve.types import ModelSpec, ReplicaId, Tier


@pytest.fixture(params=["in-process", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_started_replica_streams_every_token_once(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            ready = await bench.started("m#1", fake_model(tmp_path, "m"))
            assert ready.phases.dram_s > 0
            assert bench.events.of(Staged)[0].num_bytes > 100
            assert await bench.tokens("m#1", job("s", 500)) == list(range(1000, 1500))

    run(check())


def test_a_node_over_tcp_serves_the_same(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node("tcp", make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m"))
            assert await bench.tokens("m#1", job("s", 3)) == [1000, 1001, 1002]

    run(check())


def test_a_second_start_finds_the_bytes_in_dram(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            bench.stop("m#1", model)
            await bench.events.next(ReplicaStopped, replica_id="m#1")
            ready = await bench.started("m#2", model)
            assert ready.phases.dram_s == 0
            assert len(bench.events.of(Staged)) == 1

    run(check())


def test_starting_a_known_replica_answers_again(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            bench.start("m#1", model)
            first = await bench.started("m#1", model)
            bench.start("m#1", model)
            assert await bench.events.next(ReplicaReady) == first

    run(check())


def test_stopping_an_unknown_replica_answers_stopped(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            bench.stop("m#9", fake_model(tmp_path, "m"))
            await bench.events.next(ReplicaStopped, replica_id="m#9")

    run(check())


def test_orders_of_an_old_epoch_are_ignored(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            bench.start("m#1", model, epochs_ago=1)
            bench.stop("m#1", model)  # an unknown replica is answered at once
            await bench.events.next(ReplicaStopped, replica_id="m#1")
            assert bench.events.of(Staged) == []

    run(check())


def test_joining_again_empties_the_node_and_fences_old_orders(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            before = bench.node.spec.epoch
            await bench.node.start(bench.events)
            assert bench.node.spec.epoch > before
            assert bench.num_leases() == 0
            assert (await bench.node.stats()).dram.used == 0
            with pytest.raises(ReplicaError):
                await bench.tokens("m#1", job("s"))
            await bench.started("m#2", model)

    run(check())


def test_a_stopped_replica_hands_its_worker_to_the_next(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            a, c = fake_model(tmp_path, "a"), fake_model(tmp_path, "c")
            await bench.started("a#1", a)
            bench.stop("a#1", a)
            bench.start("c#1", c)
            await bench.events.next(ReplicaStopped, replica_id="a#1")
            await bench.events.next(ReplicaReady, replica_id="c#1")
            assert await bench.tokens("c#1", job("s", 2)) == [1000, 1001]

    run(check())


def test_workers_go_to_replicas_in_the_order_of_the_orders(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            large = fake_model(tmp_path, "large", num_bytes=3 * MIB)
            small = fake_model(tmp_path, "small")
            await bench.ready(1)
            bench.stage(small)
            await bench.events.next(Staged)
            bench.start("large#1", large)
            bench.start("small#1", small)
            await bench.events.next(ReplicaReady, replica_id="large#1")
            bench.stop("large#1", large)
            await bench.events.next(ReplicaReady, replica_id="small#1")

    run(check())


def test_a_model_returns_to_the_worker_that_served_it_last(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node("in-process", make_settings(tmp_path, num_workers=3)) as bench:
            models = {name: fake_model(tmp_path, name) for name in "ab"}
            await bench.ready(3)
            served: dict[str, set[str]] = {name: set() for name in models}
            for turn in range(6):
                name = "ab"[turn % 2]
                await bench.started(f"{name}#{turn}", models[name])
                (replica,) = bench.agent._replicas.values()
                assert replica.worker is not None
                served[name].add(replica.worker.name)
                bench.stop(f"{name}#{turn}", models[name])
                await bench.events.next(ReplicaStopped, replica_id=f"{name}#{turn}")
            assert [len(workers) for workers in served.values()] == [1, 1]
            assert served["a"].isdisjoint(served["b"])

    run(check())


def test_a_model_returns_to_the_worker_in_which_it_sleeps(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node("in-process", make_settings(tmp_path, num_workers=2)) as bench:
            a, b, c = (fake_model(tmp_path, name, sleeps=True) for name in "abc")
            await bench.ready(2)

            async def served(name: str, model: ModelSpec) -> str:
                await bench.started(name, model)
                worker = bench.agent._replicas[ReplicaId(name)].worker
                assert worker is not None
                return worker.name

            async def stopped(name: str, model: ModelSpec) -> None:
                bench.stop(name, model)
                await bench.events.next(ReplicaStopped, replica_id=name)

            first = await served("a#1", a)
            await stopped("a#1", a)
            assert await served("b#1", b) != first
            assert await served("c#1", c) == first
            await stopped("b#1", b)  # its worker has been spare for longest, and served not a
            await stopped("c#1", c)
            assert await served("a#2", a) == first

    run(check())


def test_evicted_bytes_go_to_the_start_that_follows(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        settings = make_settings(tmp_path, arena_bytes=4 * MIB)
        async with running_node(kind, settings) as bench:
            a = fake_model(tmp_path, "a", num_bytes=3 * MIB)
            c = fake_model(tmp_path, "c", num_bytes=3 * MIB)
            await bench.started("a#1", a)
            bench.stop("a#1", a)
            bench.evict(a)
            bench.start("c#1", c)
            await bench.events.next(Evicted, model_id="a")
            await bench.events.next(Staged, model_id="c")
            stats = await bench.node.stats()
            assert (stats.dram.used, stats.dram.free) == (4 * MIB, 0)
            assert {c.model_id: Tier.DRAM} == {
                model_id: residence.tier for model_id, residence in stats.models.items()
            }

    run(check())


def test_evicting_under_a_replica_fails_and_leaves_it(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            bench.evict(model)
            failed = await bench.events.next(StageFailed)
            assert failed.code == "conflict"
            assert await bench.tokens("m#1", job("s", 1)) == [1000]

    run(check())


def test_staging_reports_each_tier(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            bench.stage(model, Tier.DISK)
            assert (await bench.events.next(Staged)).tier is Tier.DISK
            bench.stage(model)
            staged = await bench.events.next(Staged)
            assert (staged.tier, staged.num_bytes > 100) == (Tier.DRAM, True)
            bench.stage(model)
            assert (await bench.events.next(Staged)).num_bytes == 0

    run(check())


def test_staging_what_is_missing_fails_by_name(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            (tmp_path / "m" / "model.safetensors").unlink()
            bench.stage(model)
            failed = await bench.events.next(StageFailed)
            assert failed.code == "bad_checkpoint"
            assert str(tmp_path / "m") in failed.message

    run(check())


def test_a_load_fault_fails_the_replica_and_spares_the_worker(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            bad = fake_model(tmp_path, "bad", load_error=("bad_checkpoint", "tensor x is odd"))
            bench.start("bad#1", bad)
            failed = await bench.events.next(ReplicaFailed, replica_id="bad#1")
            assert (failed.code, failed.message) == ("bad_checkpoint", "tensor x is odd")
            assert bench.num_leases() == 0
            pids = bench.worker_pids()
            await bench.started("good#1", fake_model(tmp_path, "good"))
            assert bench.worker_pids() == pids

    run(check())


def test_a_model_larger_than_the_arena_fails_with_the_sizes(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        settings = make_settings(tmp_path, arena_bytes=2 * MIB)
        async with running_node(kind, settings) as bench:
            bench.start("m#1", fake_model(tmp_path, "m", num_bytes=3 * MIB))
            failed = await bench.events.next(ReplicaFailed)
            assert failed.code == "model_too_large"
            assert str(2 * MIB) in failed.message

    run(check())


@pytest.mark.parametrize("load_s", [0.0, 0.2])
def test_a_start_that_is_stopped_at_once_leaves_nothing(
    kind: str, tmp_path: pathlib.Path, load_s: float
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", load_s=load_s)
            await bench.ready(1)
            for turn in range(10):
                bench.start(f"m#{turn}", model)
                for _ in range(turn % 5):
                    await asyncio.sleep(0)
                bench.stop(f"m#{turn}", model)
            for turn in range(10):
                await bench.events.next(ReplicaStopped, replica_id=f"m#{turn}")
            bench.evict(model)
            await bench.events.next(Evicted)
            assert bench.num_leases() == 0
            await bench.started("m#last", model)

    run(check())


def test_a_start_is_stopped_while_the_worker_loads(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", load_s=0.3)
            bench.start("m#1", model)
            await bench.events.next(Staged)
            (replica,) = bench.agent._replicas.values()
            await bench.until(lambda: replica._was_told_to_load)
            bench.stop("m#1", model)
            await bench.events.next(ReplicaStopped, replica_id="m#1")
            assert bench.events.of(ReplicaReady) == []
            await bench.started("m#2", model)

    run(check())


def test_a_slow_reader_gets_every_token_in_a_bounded_number_of_items(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m"))
            batches = bench.node.generate(ReplicaId("m#1"), job("s", 5000))
            tokens = list((await anext(batches)).tokens)
            while (await bench.node.stats()).replicas[ReplicaId("m#1")].num_running:
                pass
            num_items = 1
            async for batch in batches:
                num_items += 1
                tokens += batch.tokens
            assert [token.index for token in tokens] == list(range(5000))
            assert num_items < 200

    run(check())


def test_errors_of_the_engine_reach_the_stream(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m", refuses_job=True))
            with pytest.raises(ContextLengthError, match="too long"):
                await bench.tokens("m#1", job("s"))

    run(check())


def test_a_failing_step_ends_its_streams_and_not_the_replica(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m", fails_at_step=3))
            with pytest.raises(InternalError, match="the script says so"):
                await bench.tokens("m#1", job("s"))
            assert await bench.tokens("m#1", job("s", 2)) == [1000, 1001]

    run(check())


def test_stopping_a_replica_ends_its_streams(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", step_s=0.001)
            await bench.started("m#1", model)
            batches = bench.node.generate(ReplicaId("m#1"), job("s", 100_000))
            await anext(batches)
            bench.stop("m#1", model)
            with pytest.raises(ReplicaError):
                async for _ in batches:
                    pass
            await bench.events.next(ReplicaStopped)

    run(check())


def test_a_cancelled_reader_aborts_its_sequence(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", step_s=0.001)
            await bench.started("m#1", model)
            first = asyncio.Event()

            async def read(number: int) -> None:
                batches = bench.node.generate(ReplicaId("m#1"), job(f"s{number}", 100_000))
                async with contextlib.aclosing(batches):
                    async for _ in batches:
                        first.set()

            readers = [asyncio.create_task(read(number)) for number in range(20)]
            await first.wait()
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)
            stats = await bench.node.stats()
            while stats.replicas[ReplicaId("m#1")].num_running:
                stats = await bench.node.stats()
            assert stats.replicas[ReplicaId("m#1")].kv.used == 0

    run(check())


def test_a_described_source_is_checked_without_moving_its_bytes(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            facts = await bench.node.describe(model.source)
            assert (facts.architecture, facts.context_tokens) == ("Fake", 4096)
            assert (facts.directory, facts.has_chat_template) == (model.source, False)
            assert facts.lowest_tier is Tier.DISK
            assert (await bench.node.stats()).dram.used == 0
            with pytest.raises(SourceError, match="nowhere"):
                await bench.node.describe(str(tmp_path / "nowhere"))

    run(check())


def test_a_worker_whose_model_rests_describes_another_one(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            monkeypatch.setenv("FAKE_WORKER_START", "fails")  # no further one is needed
            assert (await bench.node.describe(model.source)).architecture == "Fake"
            assert await bench.tokens("m#1", job("s", 2)) == [1000, 1001]

    run(check())


def test_describing_takes_another_worker_when_all_have_requests(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", step_s=0.001)
            await bench.started("m#1", model)
            pids = bench.worker_pids()
            batches = bench.node.generate(ReplicaId("m#1"), job("s", 100_000))
            async with contextlib.aclosing(batches):
                await anext(batches)
                assert (await bench.node.describe(model.source)).architecture == "Fake"
                assert bench.worker_pids() == pids
                monkeypatch.setenv("FAKE_WORKER_START", "fails")
                with pytest.raises(ReplicaError, match="before it was ready"):
                    await bench.node.describe(model.source)

    run(check())


def test_a_model_of_many_parts_keeps_no_other_from_its_requests(
    kind: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m")
            await bench.started("m#1", model)
            monkeypatch.setattr(describing, "_MAX_TENSORS_BESIDE", 0)
            monkeypatch.setenv("FAKE_WORKER_START", "fails")
            with pytest.raises(ReplicaError, match="before it was ready"):
                await bench.node.describe(model.source)

    run(check())
