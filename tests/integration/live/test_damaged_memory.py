"""A bit that flips in the arena of a whole server: nobody computes with it, and others go on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from tests.unit.live.tiny import END, write_text

from flashserve.config import EngineSettings, NodeSettings, Settings, StoreSettings
from flashserve.errors import CheckpointError, ConflictError
from flashserve.live.generation import Generation
from flashserve.live.launcher import launch
from flashserve.live.requests import GenerationRequest
from flashserve.live.service import Service
from flashserve.node.agent import Agent
from flashserve.store.sources.reading import LocalReader
from flashserve.store.store import Store
from flashserve.types import ModelId, NodeId, SamplingParams, Tier

pytestmark = pytest.mark.integration

VICTIM, OTHER = "victim", "other"


def write_model(directory: Path, seed: int) -> None:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=END,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    write_text(directory)


async def submit(service: Service, model: str, max_tokens: int = 30) -> Generation:
    params = SamplingParams(max_tokens=max_tokens, seed=5, ignore_eos=True)
    order = GenerationRequest(
        model_id=ModelId(model), params=params, prompt="a prompt", reuse_prefix=False
    )
    return await service.submit(order)


async def text(generation: Generation) -> str:
    return "".join([chunk.text async for chunk in generation])


async def eventually(is_so: Callable[[], bool]) -> None:
    while not is_so():  # noqa: ASYNC110 - a test looks from outside
        await asyncio.sleep(0.005)


def store_of(service: Service) -> Store:
    agent = service._runtime.node(NodeId("local"))
    assert isinstance(agent, Agent)
    return agent._store


def damage(store: Store, model: str, byte: int = 3, bits: int = 0x40) -> None:
    """Flips these bits of the first number of each tensor; those of its exponent, if not told."""
    with store.lease(ModelId(model)) as lease:
        for tensor in lease.tensors:
            store.arena._map[tensor.offset + byte] ^= bits


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A server in this process, in a loop that stands still between tests."""

    runner: asyncio.Runner
    service: Service
    root: Path

    def run(self, check: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await check()

        self.runner.run(bounded())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("server")
    settings = Settings(
        data_dir=root / "data",
        node=NodeSettings(num_workers=2, threads_per_worker=1, dram_bytes=16 << 20),
        engine=EngineSettings(kv_bytes=16 << 20, max_batch_tokens=128),
        store=StoreSettings(scrub_bytes_per_s=1 << 30),
    )
    for seed, name in enumerate((VICTIM, OTHER)):
        write_model(root / name, seed)
    with asyncio.Runner() as runner:
        context = launch(settings)
        service = runner.run(context.__aenter__())
        try:
            for name in (VICTIM, OTHER):
                runner.run(service.deploy(name, str(root / name), trusted=True))
            yield Bench(runner, service, root)
        finally:
            runner.run(context.__aexit__(None, None, None))


def test_requests_wait_until_what_was_damaged_is_read_anew(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    may_read, read = threading.Event(), LocalReader.read
    may_read.set()

    def held_back(self: LocalReader, begin: int, target: memoryview) -> None:
        if VICTIM in str(self._path):
            may_read.wait(60)
        read(self, begin, target)

    monkeypatch.setattr(LocalReader, "read", held_back)

    async def check() -> None:
        service = bench.service
        wanted = await text(await submit(service, VICTIM))
        undisturbed = await text(await submit(service, OTHER))
        running = await submit(service, OTHER, max_tokens=600)
        await anext(running)

        may_read.clear()
        damage(store_of(service), VICTIM)
        await eventually(lambda: service.model(VICTIM).replicas == 0)
        assert service.model(VICTIM).tier is Tier.DISK
        asked = [await submit(service, VICTIM) for _ in range(2)]
        answers = [asyncio.create_task(text(generation)) for generation in asked]
        assert await text(await submit(service, OTHER)) == undisturbed
        assert not any(answer.done() for answer in answers)

        may_read.set()
        assert await asyncio.gather(*answers) == [wanted, wanted]
        assert all(generation.receipt.cold for generation in asked)
        await text(running)
        assert running.receipt.resumed == 0
        assert running.usage.completion_tokens == 600
        assert await text(await submit(service, OTHER)) == undisturbed

    bench.run(check)
    (line,) = (each for each in caplog.messages if "in DRAM is damaged" in each)
    assert f"{bench.root / VICTIM}/model.safetensors" in line
    assert "between its bytes 0 and" in line


def test_a_stream_over_damaged_bytes_goes_on_with_others(bench: Bench) -> None:
    """The lowest bits change no choice here, so that the stream does not break off by itself."""

    async def check() -> None:
        await text(await submit(bench.service, VICTIM))
        generation = await submit(bench.service, VICTIM, max_tokens=2000)
        await anext(generation)
        store = store_of(bench.service)
        damage(store, VICTIM, byte=0, bits=1)
        with contextlib.suppress(CheckpointError, ConflictError):  # unless the scrub was faster
            await asyncio.to_thread(store.verify, VICTIM)
        await text(generation)
        assert generation.receipt.resumed == 1
        assert generation.usage.completion_tokens == 2000

    bench.run(check)
