"""The agent with a real worker process and a tiny model; one worker for the whole module."""

from __future__ import annotations

import asyncio
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.integration.node.nodes import (
    MIB,
    TIMEOUT_S,
    Bench,
    Recorder,
    job,
    make_settings,
)
from tests.integration.node.tiny import CONTEXT_TOKENS, Tiny, change_config, make_tiny

from flashserve.errors import ContextLengthError, UnsupportedModelError
from flashserve.messages.events import Evicted, ReplicaFailed, ReplicaStopped, Staged
from flashserve.messages.work import LoadReport, UnloadReport
from flashserve.node.agent import Agent
from flashserve.node.channel import Channel
from flashserve.types import ReplicaId, Tier


class Live:
    """A started agent, and the loop that it lives in."""

    def __init__(self, runner: asyncio.Runner, bench: Bench) -> None:
        self.runner = runner
        self.bench = bench

    def run(self, check: object) -> None:
        async def in_time() -> None:
            async with asyncio.timeout(TIMEOUT_S):
                await check  # type: ignore[misc]

        self.runner.run(in_time())


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    settings = make_settings(tmp_path_factory.mktemp("data"), arena_bytes=16 * MIB, kv_bytes=MIB)
    with asyncio.Runner() as runner:
        agent, events = Agent(settings), Recorder()
        runner.run(agent.start(events))
        live = Live(runner, Bench(agent, agent, events))
        live.run(live.bench.ready(1))
        yield live
        runner.run(agent.close(grace_s=5.0))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "other", seed=1)


async def stopped(bench: Bench, replica: str, model: Tiny) -> None:
    bench.stop(replica, model.spec)
    await bench.events.next(ReplicaStopped, replica_id=replica)


def arena_mappings(pid: int) -> list[str]:
    maps = pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line.split()[1] for line in maps if "flashserve-arena" in line]


def test_answers_equal_those_of_transformers(live: Live, tiny: Tiny) -> None:
    bench = live.bench

    async def check() -> None:
        await bench.started("a#1", tiny.spec)
        prompts = [list(range(1, 2 + 7 * number)) for number in range(8)]
        answers = await asyncio.gather(
            *(
                bench.tokens("a#1", job(f"s{number}", 20, prompt=prompt))
                for number, prompt in enumerate(prompts)
            )
        )
        assert answers == [tiny.greedy(prompt, 20) for prompt in prompts]
        await stopped(bench, "a#1", tiny)

    live.run(check())


def test_a_model_in_the_place_of_an_evicted_one_answers_for_itself(
    live: Live, tiny: Tiny, other: Tiny
) -> None:
    bench = live.bench

    async def check() -> None:
        for turn, model in enumerate((tiny, other, tiny, other)):
            replica = f"{model.spec.model_id}#turn{turn}"
            await bench.started(replica, model.spec)
            assert await bench.tokens(replica, job("s", 12)) == model.greedy([1, 2, 3], 12)
            await stopped(bench, replica, model)
            bench.evict(model.spec)
            await bench.events.next(Evicted, model_id=model.spec.model_id)
        assert (await bench.node.stats()).dram.used == 0

    live.run(check())


def test_a_model_that_starts_again_is_not_built_again(
    live: Live, tiny: Tiny, other: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, reports = live.bench, []
    call = Channel.call

    async def noting(self: Channel, *args: object, **options: object) -> object:
        answer = await call(self, *args, **options)  # type: ignore[arg-type]
        reports.append(answer)
        return answer

    monkeypatch.setattr(Channel, "call", noting)

    async def check() -> None:
        for turn, model in enumerate((tiny, other, tiny, other)):
            replica = f"{model.spec.model_id}#again{turn}"
            await bench.started(replica, model.spec)
            assert await bench.tokens(replica, job("s", 12)) == model.greedy([1, 2, 3], 12)
            await stopped(bench, replica, model)
            bench.evict(model.spec)
            await bench.events.next(Evicted, model_id=model.spec.model_id)
        loads = [report.was_asleep for report in reports if isinstance(report, LoadReport)]
        unloads = [set(report.asleep) for report in reports if isinstance(report, UnloadReport)]
        assert loads[2:] == [True, True]
        assert unloads[-1] == {"tiny", "other"}

    live.run(check())


def test_a_bad_checkpoint_fails_by_name_and_the_worker_is_used_again(
    live: Live, tiny: Tiny, tmp_path: pathlib.Path
) -> None:
    bench = live.bench
    bad = make_tiny(tmp_path, "bad")
    change_config(bad.spec, intermediate_size=65)

    async def check() -> None:
        pids = bench.worker_pids()
        bench.start("bad#1", bad.spec)
        failed = await bench.events.next(ReplicaFailed, replica_id="bad#1")
        assert failed.code == "bad_checkpoint"
        assert "mlp" in failed.message
        await bench.started("good#1", tiny.spec)
        assert bench.worker_pids() == pids
        await stopped(bench, "good#1", tiny)

    live.run(check())


def test_two_hundred_streams_that_are_left_give_their_memory_back(live: Live, tiny: Tiny) -> None:
    bench = live.bench
    replica = ReplicaId("many#1")

    async def leave(number: int) -> None:
        prompt = [1 + number % 5, *range(2, 40)]
        batches = bench.node.generate(replica, job(f"s{number}", 200, prompt=prompt))
        await anext(batches)
        await batches.aclose()

    async def check() -> None:
        await bench.started(replica, tiny.spec)
        await asyncio.gather(*(leave(number) for number in range(200)))
        stats = (await bench.node.stats()).replicas[replica]
        while stats.num_running + stats.num_waiting:
            stats = (await bench.node.stats()).replicas[replica]
        assert stats.kv.used == 0
        assert stats.kv.cached > 0
        assert stats.kv.cached + stats.kv.free == stats.kv.total
        assert await bench.tokens(replica, job("after", 10)) == tiny.greedy([1, 2, 3], 10)
        await stopped(bench, replica, tiny)
        assert bench.num_leases() == 0

    live.run(check())


def test_a_prompt_beyond_the_context_is_refused(live: Live, tiny: Tiny) -> None:
    bench = live.bench

    async def check() -> None:
        await bench.started("c#1", tiny.spec)
        too_long = job("long", 1, prompt=[1] * CONTEXT_TOKENS)
        with pytest.raises(ContextLengthError, match=str(CONTEXT_TOKENS)):
            await bench.tokens("c#1", too_long)
        await stopped(bench, "c#1", tiny)

    live.run(check())


def test_describing_names_the_model_or_what_is_not_served(
    live: Live, tiny: Tiny, tmp_path: pathlib.Path
) -> None:
    bench = live.bench
    strange = make_tiny(tmp_path, "strange")
    change_config(strange.spec, architectures=["MambaForCausalLM"], model_type="mamba")

    async def check() -> None:
        facts = await bench.node.describe(tiny.spec.source)
        assert facts.architecture == "LlamaForCausalLM"
        assert facts.context_tokens == CONTEXT_TOKENS
        assert facts.kv_bytes_per_token == 2 * 2 * 2 * 8 * 4
        with pytest.raises(UnsupportedModelError, match="Mamba"):
            await bench.node.describe(strange.spec.source)

    live.run(check())


def test_the_worker_maps_the_arena_once_and_cannot_write_it(live: Live, tiny: Tiny) -> None:
    bench = live.bench

    async def check() -> None:
        bench.stage(tiny.spec)
        await bench.events.next(Staged, tier=Tier.DRAM)
        await bench.started("d#1", tiny.spec)
        (pid,) = bench.worker_pids()
        assert arena_mappings(pid) == ["r--s"]
        await stopped(bench, "d#1", tiny)

    live.run(check())


def test_computing_gives_way_to_the_server(live: Live) -> None:
    (pid,) = live.bench.worker_pids()
    threads = [int(path.name) for path in pathlib.Path(f"/proc/{pid}/task").iterdir()]
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    assert all(os.getpriority(os.PRIO_PROCESS, thread) > ours for thread in threads)


def test_the_agents_process_needs_no_tensor_library() -> None:
    program = (
        "import sys, flashserve.node.agent, flashserve.node.client, flashserve.node.server;"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
