"""fp32 greedy output equals transformers' `generate`, token for token."""

from __future__ import annotations

import random

import pytest
import torch
from tests.integration.engine.families import FAMILIES, VOCABULARY, generate, reference, served
from tests.integration.engine.support import job, make_engine, prompt_of, run

from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.messages.work import GenerateJob
from flashserve.types import SamplingParams

NUM_PROMPTS = 50


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_prompts_equal_generate_under_chunks_and_preemption(family: str) -> None:
    draw = random.Random(family)
    prompts = [
        [draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 70))]
        for _ in range(NUM_PROMPTS)
    ]
    lengths = [draw.randrange(4, 20) for _ in prompts]
    engine = make_engine(family, 256, max_batch_tokens=40, max_batch_sequences=16)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        engine.add(job(str(index), prompt, length))
    tokens = run(engine)
    model = reference(family)
    expected = {
        str(index): generate(model, prompt, length)
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    }
    assert tokens == expected
    assert engine.counts["preemptions"] > 0
    assert engine.counts["chunks"] > 0
    varied = [item for item in expected.values() if len(set(item)) > 2]
    assert len(varied) > 0.5 * NUM_PROMPTS, "the random model repeats itself"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_shared_prefix_is_reused_and_changes_nothing(family: str) -> None:
    prefix = prompt_of(40)
    prompts = [[*prefix, *prompt_of(5 + extra, seed=1 + extra)] for extra in range(4)]
    engine = make_engine(family, 512)
    for index, prompt in enumerate(prompts):
        engine.add(job(str(index), prompt, 8))
        tokens = run(engine)[str(index)]
        assert tokens == generate(reference(family), prompt, 8)
        assert engine.counts["reused_tokens"] == 40 * index
    engine.add(job("again", prompts[0], 8))
    assert run(engine)["again"] == generate(reference(family), prompts[0], 8)
    assert engine.counts["reused_tokens"] == 40 * 4


def test_a_prompt_that_is_cached_whole_still_computes_its_last_token() -> None:
    engine = make_engine("llama", 512)
    prompt = prompt_of(32)  # four whole blocks
    for name in ("first", "second"):
        engine.add(job(name, prompt, 4))
        assert run(engine)[name] == generate(reference("llama"), prompt, 4)
    assert engine.counts["reused_tokens"] == 24


def test_salts_and_refusals_keep_prefixes_apart() -> None:
    engine = make_engine("llama", 512)
    prompt = prompt_of(40)
    expected = generate(reference("llama"), prompt, 4)
    for name, changes in {
        "base": {},
        "adapter": {"salt": "adapter"},
        "private": {"reuse_prefix": False},
    }.items():
        engine.add(job(name, prompt, 4, **changes))
        assert run(engine)[name] == expected
    assert engine.counts["reused_tokens"] == 0


def test_sequences_that_share_blocks_run_together() -> None:
    engine = make_engine("qwen3", 512, max_batch_tokens=24)
    prefix = prompt_of(33)
    engine.add(job("warm", prefix, 2))
    run(engine)
    prompts = [[*prefix, index + 3] for index in range(8)]
    for index, prompt in enumerate(prompts):
        engine.add(job(str(index), prompt, 10))
    tokens = run(engine)
    for index, prompt in enumerate(prompts):
        assert tokens[str(index)] == generate(reference("qwen3"), prompt, 10)
    assert engine.counts["reused_tokens"] == 8 * 32


@pytest.mark.parametrize("num_emitted", [1, 7, 19])
def test_another_engine_goes_on_where_a_lost_one_stopped(num_emitted: int) -> None:
    prompt = prompt_of(23)
    expected = generate(reference("mistral"), prompt, 20)
    engine = make_engine("mistral", 256, max_batch_tokens=16)
    engine.add(job("x", prompt, 20, emitted_ids=tuple(expected[:num_emitted])))
    outputs = []
    while engine.has_work:
        outputs += [output for _, output in engine.step()]
    assert [output.token_id for output in outputs] == expected[num_emitted:]
    assert [output.index for output in outputs] == list(range(num_emitted, 20))
    assert [output.finish_reason for output in outputs] == [None] * (19 - num_emitted) + ["length"]


def test_an_aborted_sequence_leaves_the_others_and_all_blocks() -> None:
    engine = make_engine("llama", 512, max_batch_tokens=32)
    prompts = [prompt_of(30, seed) for seed in range(6)]
    for index, prompt in enumerate(prompts):
        engine.add(job(str(index), prompt, 12))
    seen = [name for _ in range(4) for name, _ in engine.step()]
    assert "0" in seen
    for name in ("0", "3", "5", "5", "never"):
        engine.abort(name)
    tokens = run(engine)
    assert set(tokens) == {"1", "2", "4"}
    for name in ("2", "4"):
        whole = generate(reference("llama"), prompts[int(name)], 12)
        assert whole[-len(tokens[name]) :] == tokens[name]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    prompts = [prompt_of(10 + seed, seed) for seed in range(6)]
    params = SamplingParams(
        temperature=0.8, top_p=0.95, top_k=40, seed=7, max_tokens=12, ignore_eos=True
    )
    jobs = [GenerateJob(str(i), tuple(prompt), params) for i, prompt in enumerate(prompts)]
    alone = {}
    for item in jobs:
        engine = make_engine("llama", 512)
        engine.add(item)
        alone |= run(engine)
    together = make_engine("llama", 80, max_batch_tokens=20)
    for item in reversed(jobs):
        together.add(item)
    assert run(together) == alone
    assert together.counts["preemptions"] > 0
    assert len({tuple(tokens) for tokens in alone.values()}) == len(jobs)


def test_sequences_end_at_stop_tokens_and_at_the_end_of_text() -> None:
    prompt = prompt_of(12)
    expected = generate(reference("qwen2"), prompt, 12)
    third = expected[2]
    assert third not in expected[:2]
    model = served("qwen2")
    settings = EngineSettings(kv_bytes=1 << 20)
    for params, eos in (
        (SamplingParams(temperature=0.0, max_tokens=12, stop_token_ids=(third,)), ()),
        (SamplingParams(temperature=0.0, max_tokens=12), (1, third)),
    ):
        engine = Engine(model, settings, eos_token_ids=eos)
        engine.add(GenerateJob("x", tuple(prompt), params))
        outputs = [output for _ in range(3) for _, output in engine.step()]
        assert [output.finish_reason for output in outputs] == [None, None, "stop"]
        assert not engine.has_work
    engine = Engine(model, settings, eos_token_ids=(third,))
    engine.add(job("x", prompt, 12))
    assert run(engine)["x"] == expected


def test_logprobs_are_those_of_the_model() -> None:
    prompt = prompt_of(15)
    engine = make_engine("llama", 256)
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=5)
    engine.add(GenerateJob("x", tuple(prompt), params))
    ((_, output),) = engine.step()
    with torch.no_grad():
        logits = reference("llama")(torch.tensor([prompt])).logits[0, -1]
    values, ids = logits.log_softmax(-1).topk(5)
    assert output.logprob == pytest.approx(values[0].item(), abs=1e-4)
    assert [token for token, _ in output.top_logprobs] == ids.tolist()
    assert [value for _, value in output.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
