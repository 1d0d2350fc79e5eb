"""fp32 greedy output with adapters equals PEFT's, adapter by adapter, token for token."""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import Any

import pytest
import torch
from tests.integration.engine.adapters import LINEAR, Made, Peft, config, make_peft
from tests.integration.engine.families import VOCABULARY, served
from tests.integration.engine.support import job, prompt_of, run, run_outputs

from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.engine.runner import KVShape
from flashserve.errors import DeployError, InputError, UnavailableError
from flashserve.types import AdapterId, TensorSlice

FAMILIES = ["llama", "llama-bias", "qwen2", "qwen3", "gemma2", "gemma3"]
RANKS = {"four": 4, "eight": 8, "sixteen": 16, "sixtyfour": 64}
KINDS = {
    "four": config(4, ["q_proj", "v_proj"]),
    "eight": config(8, LINEAR),
    "sixteen": config(16, LINEAR, use_rslora=True, rank_pattern={"o_proj": 3}),
    "sixtyfour": config(64, LINEAR, layers_to_transform=[1]),
}
OUTSIDE = {
    "words": config(4, ["embed_tokens", "q_proj"]),
    "head": config(8, ["lm_head", "down_proj"]),
    "both": config(2, ["lm_head", "embed_tokens"]),
}


class Arena:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}

    def read(self, tensor: TensorSlice) -> torch.Tensor:
        return self.tensors[tensor.name]


@functools.cache
def mixed(family: str) -> Peft:
    return make_peft(family, KINDS)


def make_engine(
    family: str, *adapters: Made, pool_tokens: int = 512, **settings: Any
) -> tuple[Engine, Arena]:
    model = served(family)
    shape = KVShape.of(model.config, torch.float32)
    pool = torch.zeros(pool_tokens * shape.bytes_per_token, dtype=torch.uint8)
    arena = Arena()
    options = {"block_tokens": 8, "adapter_bytes": 4 << 20, **settings}
    engine = Engine(model, EngineSettings(**options), pool, read_adapter=arena.read)
    for adapter in adapters:
        put(engine, arena, adapter)
    return engine, arena


def put(engine: Engine, arena: Arena, adapter: Made) -> None:
    arena.tensors.update(adapter.tensors)
    engine.put_adapter(adapter.image)


def job_of(name: str, adapter: AdapterId | None, prompt: list[int], num_tokens: int) -> Any:
    return job(name, prompt, num_tokens, adapter_id=adapter, salt=adapter or "")


@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_ranks_equal_peft_under_chunks_and_preemption(family: str) -> None:
    made = mixed(family)
    adapters = {name: made.image(name) for name in KINDS}
    engine, _ = make_engine(
        family, *adapters.values(), pool_tokens=256, max_batch_tokens=100, max_batch_sequences=12
    )
    draw = random.Random(family)
    names = [draw.choice([None, *KINDS]) for _ in range(24)]
    prompts = [
        [draw.randrange(3, VOCABULARY) for _ in range(draw.choice([1, 9, 30, 90]))] for _ in names
    ]
    for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
        adapter = adapters[name].adapter_id if name else None
        engine.add(job_of(str(index), adapter, prompt, 10))
    tokens = run(engine)
    expected = {
        str(index): made.generate(name, prompt, 10)
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=True))
    }
    assert tokens == expected
    assert engine.counts["preemptions"] > 0
    assert engine.counts["chunks"] > 0


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_logits_equal_peft_and_differ_from_the_base(family: str) -> None:
    made = mixed(family)
    prompt = prompt_of(20)
    base = made.logits(None, prompt).log_softmax(0)
    for name in KINDS:
        engine, _ = make_engine(family, made.image(name))
        item = job_of("x", AdapterId(f"{name}@1"), prompt, 1)
        engine.add(item)
        [(_, output)] = [pair for _ in range(3) for pair in engine.step()]
        wanted = made.logits(name, prompt).log_softmax(0)
        assert output.token_id == int(wanted.argmax())
        assert output.logprob == pytest.approx(float(wanted.max()), abs=1e-4)
        assert (wanted - base).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "gemma3"])
def test_embeddings_and_heads_equal_peft_also_when_they_are_tied(family: str) -> None:
    made = make_peft(family, OUTSIDE)
    adapters = {name: made.image(name) for name in OUTSIDE}
    engine, _ = make_engine(family, *adapters.values())
    prompts = {name: prompt_of(30, seed) for seed, name in enumerate([*OUTSIDE, "none"])}
    for name, prompt in prompts.items():
        engine.add(job_of(name, adapters[name].adapter_id if name in OUTSIDE else None, prompt, 12))
    expected = {
        name: made.generate(name if name in OUTSIDE else None, prompt, 12)
        for name, prompt in prompts.items()
    }
    assert run(engine) == expected


def test_evicted_adapters_come_back_the_same() -> None:
    made = mixed("llama")
    engine, _ = make_engine("llama", *(made.image(name) for name in KINDS), adapter_bytes=600_000)
    prompt = prompt_of(30)
    for turn in range(2):
        for name in KINDS:
            engine.add(job_of(f"{name}{turn}", AdapterId(f"{name}@1"), prompt, 8))
    tokens = run(engine)
    for name in KINDS:
        expected = made.generate(name, prompt, 8)
        assert tokens[f"{name}0"] == tokens[f"{name}1"] == expected
    assert engine.adapter_counts["evictions"] > 0
    assert len(engine.resident_adapters) < len(KINDS)


def test_known_and_idle_adapters_take_no_memory_of_the_device() -> None:
    """Of a thousand that are known, one that is used takes its own pages, and those alone."""
    made = mixed("llama")
    engine, _ = make_engine("llama", made.image("eight"))
    image = made.image("eight").image
    for number in range(1000):
        engine.put_adapter(dataclasses.replace(image, adapter_id=AdapterId(f"idle{number}@1")))
    cache = engine._adapters.cache
    engine.add(job_of("base", None, prompt_of(9), 4))
    run(engine)
    assert cache.memory is None
    engine.add(job_of("x", image.adapter_id, prompt_of(9), 4))
    run(engine)
    assert cache.memory is not None
    assert engine.resident_adapters == (image.adapter_id,)
    assert cache.memory.pages.num_used == cache.memory.num_pages(image)


def test_one_that_is_expected_is_loaded_before_anybody_asks_for_it() -> None:
    made = mixed("llama")
    four, eight, sixteen = (made.image(name) for name in ("four", "eight", "sixteen"))
    engine, _ = make_engine("llama", four, eight, sixteen, adapter_bytes=160_000)
    for adapter in (four, eight, four):
        engine.prefetch_adapter(adapter.adapter_id)
    assert engine.resident_adapters == (eight.adapter_id, four.adapter_id)
    with pytest.raises(InputError, match="not told of adapter none@1"):
        engine.prefetch_adapter(AdapterId("none@1"))
    engine.add(job_of("x", four.adapter_id, prompt_of(9), 4))
    engine.prefetch_adapter(sixteen.adapter_id)
    assert engine.resident_adapters == (four.adapter_id, sixteen.adapter_id)
    assert run(engine) == {"x": made.generate("four", prompt_of(9), 4)}
    assert engine.adapter_counts == {"loads": 3, "evictions": 1, "hits": 1}


def test_two_versions_of_one_name_run_together() -> None:
    old, new = (make_peft("llama", {"tone": config(rank, LINEAR)}) for rank in (8, 4))
    engine, arena = make_engine("llama", old.image("tone", 1))
    prompt = prompt_of(20)
    engine.add(job_of("old", AdapterId("tone@1"), prompt, 20))
    found = [engine.step() for _ in range(5)]
    put(engine, arena, new.image("tone", 2))
    engine.add(job_of("new", AdapterId("tone@2"), prompt, 12))
    engine.drop_adapter(AdapterId("tone@1"))
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        found.append(engine.step())
    for outputs in found:
        for name, output in outputs:
            tokens.setdefault(name, []).append(output.token_id)
    assert tokens == {
        "old": old.generate("tone", prompt, 20),
        "new": new.generate("tone", prompt, 12),
    }
    assert engine.counts["reused_tokens"] == 0


def test_a_damaged_adapter_ends_what_it_computed_and_is_loaded_anew() -> None:
    """The rest of the batch, and a sequence that has not begun, go on as if nothing had been."""
    made = mixed("llama")
    eight, four = made.image("eight"), made.image("four")
    engine, arena = make_engine("llama", four, max_batch_sequences=2)
    intact = dict(eight.tensors)
    arena.tensors.update({name: tensor * 1.5 for name, tensor in intact.items()})
    engine.put_adapter(eight.image)
    prompt = prompt_of(20)
    engine.add(job_of("damaged", eight.adapter_id, prompt, 12))
    engine.add(job_of("other", four.adapter_id, prompt, 12))
    engine.add(job_of("waits", eight.adapter_id, prompt, 12))
    found = [output.token_id for _ in range(3) for name, output in engine.step() if name == "other"]
    engine.drop_adapter(eight.adapter_id, is_damaged=True)
    assert eight.adapter_id in engine.resident_adapters
    arena.tensors.update(intact)
    engine.put_adapter(eight.image)
    outputs = engine.step()
    assert list(engine.failed) == ["damaged"]
    assert isinstance(engine.failed["damaged"], UnavailableError)
    assert "eight@1 was damaged" in str(engine.failed["damaged"])
    tokens: dict[str, list[int]] = {"other": found}
    while True:
        for name, output in outputs:
            tokens.setdefault(name, []).append(output.token_id)
        if not engine.has_work:
            break
        outputs = engine.step()
    assert tokens == {
        "other": made.generate("four", prompt, 12),
        "waits": made.generate("eight", prompt, 12),
    }
    assert engine.adapter_counts["loads"] == 3


def test_a_damaged_adapter_that_nobody_uses_leaves_nothing_behind() -> None:
    made = mixed("llama")
    eight = made.image("eight")
    engine, arena = make_engine("llama", eight)
    prompt = prompt_of(20)
    engine.add(job_of("before", eight.adapter_id, prompt, 4))
    run(engine)
    engine.drop_adapter(eight.adapter_id, is_damaged=True)
    assert engine.resident_adapters == ()
    with pytest.raises(InputError, match="not told"):
        engine.add(job_of("x", eight.adapter_id, prompt, 4))
    put(engine, arena, eight)
    engine.add(job_of("after", eight.adapter_id, prompt, 4))
    assert run(engine)["after"] == made.generate("eight", prompt, 4)
    assert engine.counts["reused_tokens"] == 0


def test_another_engine_goes_on_where_a_lost_one_stopped() -> None:
    made = mixed("qwen2")
    prompt = prompt_of(23)
    expected = made.generate("eight", prompt, 20)
    engine, _ = make_engine("qwen2", made.image("eight"))
    item = job("x", prompt, 20, adapter_id=AdapterId("eight@1"), emitted_ids=tuple(expected[:7]))
    engine.add(item)
    assert run(engine)["x"] == expected[7:]


def test_an_engine_that_is_closed_leaves_the_model_without_updates() -> None:
    made = mixed("gemma2")
    prompt = prompt_of(20)
    engine, _ = make_engine("gemma2", made.image("eight"))
    model = served("gemma2")
    num_hooks = sum(len(part._forward_hooks) for part in model.modules())
    engine.add(job_of("x", AdapterId("eight@1"), prompt, 4))
    run(engine)
    assert sum(len(part._forward_hooks) for part in model.modules()) > num_hooks
    engine.close()
    assert sum(len(part._forward_hooks) for part in model.modules()) == num_hooks


def test_batch_invariance_holds_with_adapters() -> None:
    """bf16 results of a sequence are the same alone and beside others, with and without chunks."""
    made = make_peft("llama", KINDS)
    model = served("llama", torch.bfloat16)
    shape = KVShape.of(model.config, torch.bfloat16)
    names = ["eight", None, "sixtyfour", "eight", "four", "sixteen"]
    prompts = [prompt_of(17 + 5 * index, index) for index in range(len(names))]
    found: list[dict[str, list[tuple[int, float | None]]]] = []
    for size in (1, 6):
        pool = torch.zeros(512 * shape.bytes_per_token, dtype=torch.uint8)
        arena = Arena()
        settings = EngineSettings(block_tokens=8, max_batch_sequences=size, batch_invariant=True)
        engine = Engine(model, settings, pool, read_adapter=arena.read)
        for name in KINDS:
            put(engine, arena, made.image(name))
        for index, (name, prompt) in enumerate(zip(names, prompts, strict=True)):
            adapter = AdapterId(f"{name}@1") if name else None
            engine.add(job_of(str(index), adapter, prompt, 12))
        outputs = run_outputs(engine)
        found.append(
            {
                key: [(item.token_id, item.logprob) for item in items]
                for key, items in outputs.items()
            }
        )
    assert found[0] == found[1]


def test_what_cannot_be_used_is_refused_alone() -> None:
    made = mixed("llama")
    good, wrong = made.image("eight"), mixed("gemma2").image("four", 7)
    foreign = make_peft("qwen3", {"tall": config(200, ["q_proj"])}).image("tall")
    engine, _ = make_engine("llama", good, wrong, foreign, adapter_bytes=300_000)
    engine.add(job_of("x", good.adapter_id, prompt_of(9), 8))
    with pytest.raises(InputError, match="was not told of adapter nobody@1"):
        engine.add(job_of("y", AdapterId("nobody@1"), prompt_of(9), 8))
    with pytest.raises(DeployError, match=r"tall@1.*rank 200.*engine.max_lora_rank is 128"):
        engine.add(job_of("y", foreign.adapter_id, prompt_of(9), 8))
    large = made.image("sixtyfour")
    put(engine, Arena(), large)
    with pytest.raises(UnavailableError, match=r"sixtyfour@1 takes \d+ bytes.*adapter_bytes"):
        engine.add(job_of("y", large.adapter_id, prompt_of(9), 8))
    assert run(engine) == {"x": made.generate("eight", prompt_of(9), 8)}


def test_one_whose_bytes_cannot_be_read_ends_its_own_sequences_only() -> None:
    made = mixed("llama")
    engine, arena = make_engine("llama", made.image("four"), made.image("eight"))
    lost = next(key for key in arena.tensors if key.startswith("eight@1"))
    del arena.tensors[lost]
    failed = {}
    tokens: dict[str, list[int]] = {}
    for name in ("four", "eight"):
        engine.add(job_of(name, AdapterId(f"{name}@1"), prompt_of(9), 4))
    while engine.has_work:
        for name, output in engine.step():
            tokens.setdefault(name, []).append(output.token_id)
        failed.update(engine.failed)
    assert list(failed) == ["eight"]
    assert "eight@1 could not be loaded" in failed["eight"].message
    assert tokens == {"four": made.generate("four", prompt_of(9), 4)}
