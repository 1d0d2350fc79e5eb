"""batch_invariant: bf16 results to the last bit, whatever else the engine computes."""

from __future__ import annotations

import pytest
import torch
from tests.integration.engine.support import job, make_engine, prompt_of, run_outputs

from flashserve.engine.engine import Engine

FAMILIES = ["llama", "qwen2-sliding", "qwen3", "qwen3-moe", "mistral", "gemma2", "gemma3"]
PROMPTS = [prompt_of(1 + 9 * index, seed=index) for index in range(10)]
NUM_TOKENS = 14


def make_invariant(family: str, pool_tokens: int = 2048, **settings: object) -> Engine:
    return make_engine(family, pool_tokens, torch.bfloat16, batch_invariant=True, **settings)


def results(engine: Engine) -> dict[str, list[tuple[int, float | None]]]:
    """Tokens and their log-probabilities, to the last bit."""
    return {
        name: [(output.token_id, output.logprob) for output in outputs]
        for name, outputs in run_outputs(engine).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_does_not_depend_on_the_batch(family: str) -> None:
    alone = {}
    for index, prompt in enumerate(PROMPTS):
        engine = make_invariant(family)
        engine.add(job(str(index), prompt, NUM_TOKENS))
        alone |= results(engine)
    for size in (3, 8):
        engine = make_invariant(family, max_batch_sequences=size)
        for index in reversed(range(len(PROMPTS))):
            engine.add(job(str(index), PROMPTS[index], NUM_TOKENS))
        assert results(engine) == alone
    crowded = make_invariant(family, pool_tokens=160, max_batch_tokens=64)
    for index, prompt in enumerate(PROMPTS):
        crowded.add(job(str(index), prompt, NUM_TOKENS))
    outputs = results(crowded)
    assert outputs == alone
    assert crowded.counts["preemptions"] > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_goes_on_the_same_on_another_engine(family: str) -> None:
    first = make_invariant(family)
    for index, prompt in enumerate(PROMPTS):
        first.add(job(str(index), prompt, NUM_TOKENS))
    whole = results(first)
    second = make_invariant(family)
    cuts = {str(index): 1 + index for index in range(len(PROMPTS))}
    for index, prompt in enumerate(PROMPTS):
        emitted = tuple(token for token, _ in whole[str(index)][: cuts[str(index)]])
        second.add(job(str(index), prompt, NUM_TOKENS, emitted_ids=emitted))
    assert results(second) == {name: whole[name][cut:] for name, cut in cuts.items()}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_plain_bf16_goes_on_as_a_fresh_run_on_prompt_and_emitted_tokens(family: str) -> None:
    prompt = prompt_of(19, seed=3)
    emitted = tuple(prompt_of(6, seed=4))  # whatever another replica may have said
    resumed = make_engine(family, 2048, torch.bfloat16)
    resumed.add(job("x", prompt, len(emitted) + NUM_TOKENS, emitted_ids=emitted))
    fresh = make_engine(family, 2048, torch.bfloat16)
    fresh.add(job("x", (*prompt, *emitted), NUM_TOKENS))
    assert results(resumed) == results(fresh)
