"""Workers and their parent die, hang and fail to start; the agent says so and goes on."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from tests.integration.node.nodes import (
    FAKE_WORKER,
    TIMEOUT_S,
    Recorder,
    fake_model,
    job,
    make_settings,
    read,
    run,
    running_agent,
    running_node,
)

from flashserve.errors import ReplicaError, SelfCheckError
from flashserve.messages.events import ReplicaLost, ReplicaStopped, WorkersChanged
from flashserve.node.agent import Agent
from flashserve.types import ReplicaId


@pytest.fixture(params=["in-process", "unix"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_a_killed_worker_breaks_its_streams_and_is_replaced(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", step_s=0.001)
            await bench.started("m#1", model)
            batches = bench.node.generate(ReplicaId("m#1"), job("s", 100_000))
            received = list((await anext(batches)).tokens)
            (pid,) = bench.worker_pids()
            os.kill(pid, signal.SIGKILL)
            with pytest.raises(ReplicaError):
                await read(batches, received)
            assert [token.index for token in received] == list(range(len(received)))
            await bench.events.next(WorkersChanged, num_ready=0)
            lost = await bench.events.next(ReplicaLost, replica_id="m#1")
            assert str(pid) in lost.reason
            await bench.events.next(WorkersChanged, num_ready=1)
            assert bench.num_leases() == 0
            assert pid not in bench.worker_pids()
            await bench.started("m#2", model)
            assert len(bench.events.of(ReplicaLost)) == 1
            assert bench.events.of(ReplicaStopped) == []

    run(check())


def test_a_model_that_fails_its_check_is_lost_and_its_worker_used_again(
    kind: str, tmp_path: pathlib.Path
) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m", fails_its_check=True))
            pids = bench.worker_pids()
            with pytest.raises(SelfCheckError, match="it differs"):
                await bench.tokens("m#1", job("s", 100_000))
            lost = await bench.events.next(ReplicaLost, replica_id="m#1")
            assert "it differs" in lost.reason
            with pytest.raises(ReplicaError):
                await bench.tokens("m#1", job("late"))
            await bench.started("n#1", fake_model(tmp_path, "n"))
            assert await bench.tokens("n#1", job("s", 1)) == [1000]
            assert bench.worker_pids() == pids
            assert bench.num_leases() == 1

    run(check())


def test_a_worker_that_dies_in_a_load_is_reported_lost(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            bench.start("m#1", fake_model(tmp_path, "m", dies_in_load=True))
            await bench.events.next(ReplicaLost, replica_id="m#1")
            await bench.started("n#1", fake_model(tmp_path, "n"))
            assert bench.num_leases() == 1

    run(check())


def test_a_killed_spare_worker_is_replaced(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path)) as bench:
            await bench.ready(1)
            (pid,) = bench.worker_pids()
            os.kill(pid, signal.SIGKILL)
            await bench.events.next(WorkersChanged, num_ready=0)
            await bench.events.next(WorkersChanged, num_ready=1)
            assert bench.events.of(ReplicaLost) == []

    run(check())


def test_a_worker_whose_engine_does_not_recover_is_replaced(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path)) as bench:
            model = fake_model(tmp_path, "m", fails_at_step=2, loses_memory=True)
            await bench.started("m#1", model)
            with pytest.raises(ReplicaError):
                await bench.tokens("m#1", job("s"))
            await bench.events.next(ReplicaLost)
            await bench.events.next(WorkersChanged, num_ready=1)

    run(check())


def test_a_worker_that_does_not_start_is_tried_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        monkeypatch.setenv("FAKE_WORKER_START", "fails")
        async with running_agent(make_settings(tmp_path)) as bench:
            await bench.until(lambda: "0-1" in _names(bench.agent))
            assert bench.events.of(WorkersChanged) == [WorkersChanged(bench.names[0], 0)]
            monkeypatch.delenv("FAKE_WORKER_START")
            await bench.started("m#1", fake_model(tmp_path, "m"))

    run(check())


def _names(agent: Agent) -> set[str]:
    return {worker.name for worker in agent._pool._all}


def test_a_program_that_does_not_exist_leaves_the_agent_alive(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path), ("/does/not/exist",)) as bench:
            model = fake_model(tmp_path, "m")
            bench.start("m#1", model)
            bench.stop("m#1", model)
            await bench.events.next(ReplicaStopped)

    run(check())


def test_closing_ends_workers_that_start_load_or_generate(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path, num_workers=3)) as bench:
            await bench.ready(3)
            await bench.started("a#1", fake_model(tmp_path, "a", step_s=0.001))
            batches = bench.node.generate(ReplicaId("a#1"), job("s", 100_000))
            await anext(batches)
            bench.start("b#1", fake_model(tmp_path, "b", load_s=600.0))
            spare = next(iter(bench.agent._pool.spare))
            monkeypatch.setenv("FAKE_WORKER_START", "600")
            spare.process.kill()
            await bench.events.next(WorkersChanged, num_ready=2)
            pids = bench.worker_pids()
            await bench.agent.close(grace_s=0.2)
            with pytest.raises(ReplicaError):
                async for _ in batches:
                    pass
            assert not any(_is_alive(pid) for pid in pids)

    run(check())


def test_closing_before_anything_is_ready_leaves_nothing(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        for _ in range(3):
            agent = Agent(make_settings(tmp_path), worker_command=FAKE_WORKER)
            await agent.start(Recorder())
            await agent.close(grace_s=5.0)
            await agent.close(grace_s=5.0)
        await Agent(make_settings(tmp_path)).close(grace_s=5.0)

    run(check())


def test_many_readers_that_leave_give_everything_back(kind: str, tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_node(kind, make_settings(tmp_path)) as bench:
            await bench.started("m#1", fake_model(tmp_path, "m", step_s=0.001))

            async def leave_after(number: int) -> None:
                left = number % 3
                batches = bench.node.generate(ReplicaId("m#1"), job(f"s{number}", 100_000))
                async for _ in batches:
                    if (left := left - 1) < 0:
                        break
                await batches.aclose()

            await asyncio.gather(*(leave_after(number) for number in range(200)))
            while (stats := await bench.node.stats()).replicas[ReplicaId("m#1")].num_running:
                pass
            kv = stats.replicas[ReplicaId("m#1")].kv
            assert (kv.used, kv.used + kv.cached + kv.free) == (0, kv.total)

    run(check())


_PARENT = """
import asyncio, pathlib, sys
from tests.integration.node.nodes import Recorder, fake_model, job, make_settings
from tests.integration.node.nodes import FAKE_WORKER, running_agent

async def main():
    path = pathlib.Path(sys.argv[1])
    async with running_agent(make_settings(path, num_workers=3)) as bench:
        await bench.ready(2)
        print("pids", *bench.worker_pids(), flush=True)
        await asyncio.sleep(600)

asyncio.run(main())
"""


def test_no_worker_outlives_a_killed_parent(tmp_path: pathlib.Path) -> None:
    """Two workers are ready by then, the third may still be starting."""
    root = pathlib.Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
        text=True,
    ) as parent:
        assert parent.stdout is not None
        line = next(line for line in parent.stdout if line.startswith("pids"))
        pids = [int(pid) for pid in line.split()[1:]]
        assert len(pids) == 3
        parent.kill()
    deadline = time.monotonic() + TIMEOUT_S
    while any(_is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "a worker has outlived its parent"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    """A zombie, whom its new parent has not reaped yet, holds nothing and counts as dead."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"
