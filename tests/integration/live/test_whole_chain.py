"""The service over a real agent, store, worker process and engine, with a tiny random model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from tests.unit.live.tiny import END, byte_tokenizer, write_text

from flashserve.config import EngineSettings, NodeSettings, PolicySettings, Settings
from flashserve.errors import (
    CheckpointError,
    DeadlineError,
    DrainingError,
    ModelTooLargeError,
    QueueFullError,
)
from flashserve.live.generation import Generation
from flashserve.live.launcher import launch
from flashserve.live.requests import GenerationRequest, TextChunk
from flashserve.live.service import Service
from flashserve.types import ModelId, SamplingParams, Tier

pytestmark = pytest.mark.integration
ARENA_BYTES = 32 << 20
CONTEXT = 4096


class Chain:
    """One server for the whole module, in a loop that stands still between tests."""

    def __init__(self, runner: asyncio.Runner, root: Path) -> None:
        self.root = root
        self.checkpoint = root / "checkpoint"
        self._runner = runner
        self._context: AbstractAsyncContextManager[Service]
        self.service: Service

    def run(self, scenario: Callable[[], Awaitable[None]]) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(120):
                await scenario()

        self._runner.run(bounded())

    def start(self) -> None:
        settings = Settings(
            data_dir=self.root / "data",
            node=NodeSettings(
                num_workers=1, threads_per_worker=1, dram_bytes=ARENA_BYTES, adapter_bytes=0
            ),
            engine=EngineSettings(kv_bytes=16 << 20, max_batch_tokens=128),
            policy=PolicySettings(queue_limit=2, slot_patience_s=3600.0),
        )
        self._context = launch(settings)
        self.service = self._runner.run(self._context.__aenter__())

    def stop(self) -> None:
        self._runner.run(self._context.__aexit__(None, None, None))

    async def submit(self, model: str = "one", **fields: Any) -> Generation:
        return await self.service.submit(request(model, **fields))

    async def generate(self, model: str = "one", **fields: Any) -> tuple[Generation, str]:
        generation = await self.submit(model, **fields)
        return generation, text_of([chunk async for chunk in generation])

    async def free_worker(self) -> None:
        """So that a deployment need not start a worker of its own."""
        for name in ("one", "two"):
            await self.service.evict(name, Tier.DRAM)

    async def eventually(self, is_so: Callable[[], bool]) -> None:
        while not is_so():  # noqa: ASYNC110 - a test looks from outside
            await asyncio.sleep(0.005)


def request(model: str, **fields: Any) -> GenerationRequest:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    wanted: dict[str, Any] = {"max_tokens": 40, "seed": 5, "ignore_eos": True}
    wanted |= {name: fields.pop(name) for name in list(fields) if name in names}
    return GenerationRequest(
        model_id=ModelId(model),
        params=SamplingParams(**wanted),
        **{"prompt": "a prompt of the usual length", "reuse_prefix": False, **fields},
    )


def text_of(chunks: list[TextChunk], choice: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.choice == choice)


def worker_pids() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "flashserve.node.worker" in child.cmdline()]


def write_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=END + 1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=END,
    )
    transformers.LlamaForCausalLM(config).float().save_pretrained(directory)
    write_text(directory, chat=True)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    root = tmp_path_factory.mktemp("chain")
    with asyncio.Runner() as runner:
        chain = Chain(runner, root)
        write_model(chain.checkpoint)
        chain.start()
        try:
            for name in ("one", "two"):
                runner.run(chain.service.deploy(name, str(chain.checkpoint), trusted=True))
            yield chain
        finally:
            chain.stop()
            assert worker_pids() == []


def test_a_cold_model_answers_and_says_where_the_time_went(chain: Chain) -> None:
    async def scenario() -> None:
        generation, text = await chain.generate()
        assert text
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (28, 40)
        receipt = generation.receipt
        assert (receipt.tier, receipt.cold) == (Tier.DISK, True)
        assert receipt.actual.device_s > 0
        assert receipt.actual.prefill_s > 0
        assert receipt.ttft_s is not None
        assert receipt.actual.total_s <= receipt.ttft_s

        warm, again = await chain.generate()
        assert again == text
        assert (warm.receipt.tier, warm.receipt.cold) == (Tier.DEVICE, False)
        assert warm.receipt.actual.startup_s == 0
        assert warm.receipt.gateway_in_s is not None

    chain.run(scenario)


def test_text_is_that_of_transformers(chain: Chain) -> None:
    tokenizer = byte_tokenizer()
    model = transformers.LlamaForCausalLM.from_pretrained(chain.checkpoint)
    ids = tokenizer.encode("a prompt of the usual length").ids
    wanted = model.generate(
        torch.tensor([ids]),
        max_new_tokens=40,
        min_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
    )

    async def scenario() -> None:
        _, text = await chain.generate(temperature=0.0)
        assert text == tokenizer.decode(wanted[0, len(ids) :].tolist())

    chain.run(scenario)


def test_a_stop_string_ends_the_text_before_it(chain: Chain) -> None:
    async def scenario() -> None:
        _, whole = await chain.generate()
        stop = whole[12:15]
        generation, text = await chain.generate(stop=(stop,))
        assert text == whole[: whole.index(stop)]
        assert generation.usage.completion_tokens < 40
        await chain.eventually(lambda: chain.service.model("one").in_flight == 0)

    chain.run(scenario)


def test_choices_are_what_their_seeds_make_them(chain: Chain) -> None:
    async def scenario() -> None:
        generation = await chain.submit(num_choices=3, seed=11)
        chunks = [chunk async for chunk in generation]
        texts = [text_of(chunks, choice) for choice in range(3)]
        assert texts == [(await chain.generate(seed=11 + i))[1] for i in range(3)]
        assert len(set(texts)) == 3
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (28, 120)

    chain.run(scenario)


def test_logprobs_come_with_every_token(chain: Chain) -> None:
    async def scenario() -> None:
        generation = await chain.submit(logprobs=2, temperature=0.0, max_tokens=10)
        tokens = [one async for chunk in generation async for one in _each(chunk.logprobs)]
        assert len(tokens) == 10
        for token in tokens:
            assert len(token.top) == 2
            assert token.logprob == pytest.approx(token.top[0][2])
            assert token.top[0][1] == token.token_bytes
            assert token.logprob >= token.top[1][2]

    chain.run(scenario)


async def _each(values: Any) -> Any:
    for value in values or ():
        yield value


def test_chat_without_a_limit_is_bounded_by_the_context(chain: Chain) -> None:
    async def scenario() -> None:
        chat = ({"role": "user", "content": "x" * (CONTEXT - 50)},)
        generation, _ = await chain.generate(prompt=None, messages=chat, max_tokens_given=False)
        assert generation.usage.prompt_tokens + generation.usage.completion_tokens == CONTEXT

    chain.run(scenario)


def test_two_models_take_turns_on_one_worker(chain: Chain) -> None:
    async def scenario() -> None:
        _, wanted = await chain.generate()
        for _ in range(2):
            answers = await asyncio.gather(
                *(chain.generate(name) for name in ("one", "two", "one", "two"))
            )
            assert [text for _, text in answers] == [wanted] * 4
        (one, two) = await chain.service.models()
        assert {one.state, two.state} == {"ready", "cold"}
        assert one.tier >= Tier.DRAM
        assert two.tier >= Tier.DRAM

    chain.run(scenario)


def test_a_model_with_no_keep_alive_is_cold_after_each_answer(chain: Chain) -> None:
    async def scenario() -> None:
        await chain.free_worker()
        await chain.service.deploy("zero", str(chain.checkpoint), keep_alive_s=0, trusted=True)
        _, wanted = await chain.generate("zero")
        await chain.eventually(lambda: chain.service.model("zero").state == "cold")
        generation, text = await chain.generate("zero")
        assert text == wanted
        assert (generation.receipt.tier, generation.receipt.cold) == (Tier.DRAM, True)
        assert generation.receipt.actual.dram_s == 0
        await chain.eventually(lambda: chain.service.model("zero").state == "cold")
        evicted = await chain.service.evict("zero", Tier.DRAM)
        assert (evicted.tier, evicted.dram_bytes) == (Tier.DISK, 0)
        staged = await chain.service.stage("zero", Tier.DRAM)
        assert staged.tier is Tier.DRAM
        assert staged.dram_bytes > 0
        await chain.service.delete("zero")

    chain.run(scenario)


def test_who_waits_behind_a_busy_model_meets_deadline_or_full_queue(chain: Chain) -> None:
    async def scenario() -> None:
        busy = await chain.submit(max_tokens=4000)
        await anext(busy)
        late = await chain.submit("two", deadline_s=0.05)
        other = await chain.submit("two")
        with pytest.raises(QueueFullError) as caught:
            await chain.submit("two")
        assert caught.value.retry_after_s is not None
        with pytest.raises(DeadlineError):
            await anext(late)
        await busy.aclose()
        assert [chunk async for chunk in other][-1].finish_reason == "length"
        assert other.receipt.actual.queue_s > 0

    chain.run(scenario)


def test_two_hundred_clients_that_leave_take_nothing_with_them(chain: Chain) -> None:
    async def leave_early(patience: int) -> None:
        generation = await chain.submit(max_tokens=500, num_choices=1 + patience % 2)
        for _ in range(patience % 5):
            await anext(generation)
        await generation.aclose()

    async def scenario() -> None:
        await chain.generate()
        for _ in range(10):
            await asyncio.gather(*(leave_early(number) for number in range(20)))
        await chain.eventually(lambda: chain.service.model("one").in_flight == 0)
        one, _ = await chain.service.models()
        assert one.kv is not None
        assert one.kv.used == 0
        assert one.kv.cached + one.kv.free == one.kv.total

    chain.run(scenario)


@pytest.mark.parametrize("damage", ["truncated", "mismatched"])
def test_a_damaged_checkpoint_is_refused_and_the_others_go_on(chain: Chain, damage: str) -> None:
    directory = chain.root / damage
    write_model(directory)
    if damage == "truncated":
        weights = directory / "model.safetensors"
        os.truncate(weights, weights.stat().st_size - 100)
    else:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, "hidden_size": 48}))

    async def scenario() -> None:
        await chain.free_worker()
        with pytest.raises(CheckpointError) as caught:
            await chain.service.deploy("bad", str(directory), trusted=True)
        assert "\n" not in caught.value.message
        await chain.generate()

    chain.run(scenario)


def test_a_model_larger_than_the_arena_is_refused_with_both_sizes(chain: Chain) -> None:
    directory = chain.root / "large"
    write_model(directory)
    num_bytes = ARENA_BYTES + 4
    tensor = {"dtype": "F32", "shape": [num_bytes // 4], "data_offsets": [0, num_bytes]}
    header = json.dumps({"weight": tensor}).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + num_bytes)

    async def scenario() -> None:
        with pytest.raises(ModelTooLargeError) as caught:
            await chain.service.deploy("large", str(directory), trusted=True)
        assert str(ARENA_BYTES) in caught.value.message
        num_written = (directory / "model.safetensors").stat().st_size
        assert str(num_written) in caught.value.message

    chain.run(scenario)


def test_killing_the_worker_does_not_show_in_the_text(chain: Chain) -> None:
    num_choices = 2

    async def scenario() -> None:
        whole = await chain.submit(num_choices=num_choices, max_tokens=300)
        wanted = [chunk async for chunk in whole]

        generation = await chain.submit(num_choices=num_choices, max_tokens=300)
        chunks = [await anext(generation) for _ in range(20)]
        for pid in worker_pids():
            os.kill(pid, signal.SIGKILL)
        chunks += [chunk async for chunk in generation]
        for choice in range(num_choices):
            assert text_of(chunks, choice) == text_of(wanted, choice)
        assert generation.usage == whole.usage
        assert sum(chunk.num_tokens for chunk in chunks) == 300 * num_choices
        assert generation.receipt.resumed == 1
        assert chain.service.is_ready

    chain.run(scenario)


def test_a_drained_server_comes_back_with_its_models_cold(chain: Chain) -> None:
    async def drained() -> None:
        short = await chain.submit(max_tokens=200)
        long = await chain.submit(max_tokens=4000)
        await anext(long)
        draining = asyncio.create_task(chain.service.drain(0.5))
        await asyncio.sleep(0)
        with pytest.raises(DrainingError):
            await chain.submit()
        assert [chunk async for chunk in short][-1].finish_reason == "length"
        with pytest.raises(DrainingError, match="shut down before"):
            async for _ in long:
                pass
        await draining

    async def back() -> None:
        models = await chain.service.models()
        assert [(one.name, one.state, one.tier) for one in models] == [
            ("one", "cold", Tier.DISK),
            ("two", "cold", Tier.DISK),
        ]
        generation, text = await chain.generate()
        assert text
        assert generation.receipt.cold

    chain.run(drained)
    chain.stop()
    assert worker_pids() == []
    chain.start()
    chain.run(back)
