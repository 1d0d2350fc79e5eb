"""Real workers serve a real adapter through the node, token for token as PEFT does."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tests.integration.node.nodes import MIB, job, make_settings, run, running_node
from tests.integration.node.tiny import Tiny, make_tiny
from transformers import LlamaForCausalLM

from flashserve.messages.events import ReplicaLost, ReplicaStopped
from flashserve.messages.work import AdapterFacts, GenerateJob, LoadReport
from flashserve.node.channel import Channel
from flashserve.node.process import WORKER_COMMAND
from flashserve.types import AdapterId, AdapterSpec, ReplicaId

PROMPT = [5, 17, 31, 2]
NUM_TOKENS = 12


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def train(tiny: Tiny, directory: Path, rank: int, seed: int) -> list[int]:
    """Saves a random adapter; what PEFT answers with it."""
    base = LlamaForCausalLM.from_pretrained(tiny.spec.source)
    tuned = get_peft_model(base, LoraConfig(r=rank, target_modules="all-linear"))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    tuned.save_pretrained(directory)
    base = LlamaForCausalLM.from_pretrained(tiny.spec.source)
    tuned = PeftModel.from_pretrained(base, directory).eval()
    ids = torch.tensor([PROMPT])
    output = tuned.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(PROMPT) :].tolist()


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_two_ranks_and_the_base_in_one_batch(tmp_path: Path) -> None:
    tiny = make_tiny(tmp_path, "tiny")
    expected = {
        "small": train(tiny, tmp_path / "small", 4, 1),
        "large": train(tiny, tmp_path / "large", 16, 2),
        "": tiny.greedy(PROMPT, NUM_TOKENS),
    }
    assert len({tuple(tokens) for tokens in expected.values()}) == 3

    async def check() -> None:
        settings = make_settings(tmp_path / "data", 1, 16 * MIB, 2 * MIB, kv_bytes=4 * MIB)
        async with running_node("unix", settings, WORKER_COMMAND) as bench:
            await bench.started("r", tiny.spec)
            for name in ("small", "large"):
                source = str(tmp_path / name)
                facts = await bench.node.describe_adapter(source, tiny.spec)
                spec = AdapterSpec(
                    name, 1, tiny.spec.model_id, source, facts.size_bytes, facts.identity
                )
                bench.node.declare_adapter(spec)

            async def answer(name: str, number: int) -> list[int]:
                wanted = job(f"{name}{number}", NUM_TOKENS, prompt=PROMPT)
                if name:
                    adapter_id = AdapterId(f"{name}@1")
                    wanted = dataclasses.replace(wanted, adapter_id=adapter_id, salt=adapter_id)
                return await bench.tokens("r", wanted)

            names = [*expected] * 2
            found = await asyncio.gather(*(answer(name, n) for n, name in enumerate(names)))
            assert found == [expected[name] for name in names]
            bench.node.retire_adapter(AdapterId("small@1"))
            assert await answer("large", 9) == expected["large"]
            assert AdapterId("small@1") not in (await bench.node.stats()).adapters

    run(check())


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_answers_as_before_after_its_replica_has_slept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny(tmp_path, "tiny")
    expected = train(tiny, tmp_path / "tuned", 8, 3)
    assert expected != tiny.greedy(PROMPT, NUM_TOKENS)
    reports: list[LoadReport] = []
    call = Channel.call

    async def noting(self: Channel, *args: Any, **options: Any) -> Any:
        answer = await call(self, *args, **options)
        if isinstance(answer, LoadReport):
            reports.append(answer)
        return answer

    monkeypatch.setattr(Channel, "call", noting)

    async def check() -> None:
        settings = make_settings(tmp_path / "data", 1, 16 * MIB, 2 * MIB, kv_bytes=4 * MIB)
        async with running_node("unix", settings, WORKER_COMMAND) as bench:
            source = str(tmp_path / "tuned")
            await bench.started("r0", tiny.spec)
            facts = await bench.node.describe_adapter(source, tiny.spec)
            spec = AdapterSpec(
                "tuned", 1, tiny.spec.model_id, source, facts.size_bytes, facts.identity
            )
            bench.node.declare_adapter(spec)
            for turn in range(3):
                if turn:
                    await bench.started(f"r{turn}", tiny.spec)
                plain = job(f"s{turn}", NUM_TOKENS, prompt=PROMPT)
                wanted = dataclasses.replace(
                    plain, adapter_id=spec.adapter_id, salt=spec.adapter_id
                )
                assert await bench.tokens(f"r{turn}", wanted) == expected
                bench.stop(f"r{turn}", tiny.spec)
                await bench.events.next(ReplicaStopped, replica_id=f"r{turn}")
        assert [report.was_asleep for report in reports] == [False, True, True]

    run(check())


def spec_of(name: str, version: int, tiny: Tiny, facts: AdapterFacts, source: Path) -> AdapterSpec:
    return AdapterSpec(
        name, version, tiny.spec.model_id, str(source), facts.size_bytes, facts.identity
    )


def asks(sequence_id: str, spec: AdapterSpec, **changes: Any) -> GenerateJob:
    plain = job(sequence_id, NUM_TOKENS, prompt=PROMPT)
    return dataclasses.replace(plain, adapter_id=spec.adapter_id, salt=spec.adapter_id, **changes)


@pytest.mark.filterwarnings("ignore")
def test_a_sequence_goes_on_with_its_version_after_a_death_and_a_replacement(
    tmp_path: Path,
) -> None:
    """The worker that began with it is killed, and the name has other weights by then."""
    tiny = make_tiny(tmp_path, "tiny")
    sources = [tmp_path / "old", tmp_path / "new"]
    old, new = (train(tiny, source, 8, seed) for seed, source in enumerate(sources, 4))
    assert old != new
    num_before = 5

    async def check() -> None:
        settings = make_settings(tmp_path / "data", 2, 16 * MIB, 2 * MIB, kv_bytes=4 * MIB)
        async with running_node("unix", settings, WORKER_COMMAND) as bench:
            facts = [
                await bench.node.describe_adapter(str(source), tiny.spec) for source in sources
            ]
            first, second = (
                spec_of("tone", version, tiny, found, source)
                for version, (found, source) in enumerate(zip(facts, sources, strict=True), 1)
            )
            bench.node.declare_adapter(first)
            await bench.started("r0", tiny.spec)
            stream = bench.node.generate(ReplicaId("r0"), asks("s0", first))
            begun: list[int] = []
            async for batch in stream:
                begun += [token.token_id for token in batch.tokens]
                if len(begun) >= num_before:
                    break
            bench.node.declare_adapter(second)
            worker = bench.agent._replicas[ReplicaId("r0")].worker
            assert worker is not None
            worker.process.kill()
            await bench.events.next(ReplicaLost, replica_id="r0")
            await stream.aclose()
            assert begun == old[: len(begun)]

            bench.node.prefetch_adapter(first.adapter_id, into_pages=True)
            await bench.started("r1", tiny.spec)
            bench.node.prefetch_adapter(second.adapter_id, into_pages=True)
            rest = asks("s1", first, emitted_ids=tuple(begun[:num_before]))
            found = await asyncio.gather(
                bench.tokens("r1", rest), bench.tokens("r1", asks("s2", second))
            )
            assert found == [old[num_before:], new]
            bench.node.retire_adapter(first.adapter_id)
            assert set((await bench.node.stats()).adapters) == {second.adapter_id}
            assert await bench.tokens("r1", asks("s3", second)) == new

    run(check())
