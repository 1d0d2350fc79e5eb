"""The real small model, from its checkpoint's bytes."""

from __future__ import annotations

import json
import mmap
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
import transformers
from tests.integration.engine.families import generate
from tests.integration.engine.support import job, run_outputs
from torch import nn

from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.engine.engine import Engine
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.device.bind import bind
from flashserve.types import TensorSlice

pytestmark = pytest.mark.integration

REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
NUM_TOKENS = 10
TEXTS = [
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "The three laws of motion are",
    "Water boils at",
    "To make a good cup of tea, first",
    "Der schnelle braune Fuchs",
    "1, 1, 2, 3, 5, 8,",
    "Dear Sir or Madam,",
    "The mitochondria",
    "In 1969, ",
    "SELECT name FROM users WHERE",
    "A",
    "Photosynthesis is the process by which plants " * 6,
    "The quick brown fox jumps over the lazy dog. " * 10,
    "Q: What is the largest planet?\nA:",
]


@pytest.fixture(scope="module")
def directory() -> pathlib.Path:
    """The checkpoint, converted once per clone."""
    path = REPOSITORY / ".demo" / "models" / "smollm2"
    subprocess.run([sys.executable, "-m", "flashserve.store.sources.demo", str(path)], check=True)
    return path


def load(directory: pathlib.Path, dtype: torch.dtype) -> nn.Module:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    tensors = tuple(
        TensorSlice(item.name, item.dtype, item.shape, item.begin, item.end - item.begin)
        for item in read_layout(directory).tensors
    )
    loading.describe(config, tensors)
    model = loading.build_skeleton(config, dtype)
    with (directory / "model.safetensors").open("rb") as file:
        image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    bind(model, tensors, image, dtype)
    return model


def make_engine(model: nn.Module, **settings: Any) -> Engine:
    return Engine(model, EngineSettings(**{"kv_bytes": 16 << 20, **settings}))


def prompts_of(directory: pathlib.Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return [tokenizer(text)["input_ids"] for text in TEXTS]


@torch.inference_mode()
def greedy(model: nn.Module, prompt: list[int], tokens: list[int]) -> list[int]:
    """What transformers chooses after the prompt and after each but the last of `tokens`: `tokens`
    again, if they are its own greedy continuation. One forward, where generating takes many.
    """
    assert len(tokens) == NUM_TOKENS
    logits = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits
    chosen: list[int] = logits[0, len(prompt) - 1 :].argmax(-1).tolist()
    return chosen


def test_sixteen_prompts_equal_generate_under_chunks_and_preemption(
    directory: pathlib.Path,
) -> None:
    prompts = prompts_of(directory)
    engine = make_engine(load(directory, torch.float32), max_batch_tokens=64, kv_bytes=10 << 20)
    for index, prompt in enumerate(prompts):
        engine.add(job(str(index), prompt, NUM_TOKENS))
    outputs = run_outputs(engine)
    reference = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for index, prompt in enumerate(prompts):
        tokens = [output.token_id for output in outputs[str(index)]]
        assert tokens == greedy(reference, prompt, tokens), TEXTS[index]
    assert tokens == generate(reference, prompt, NUM_TOKENS), "as `greedy` has it"
    assert engine.counts["chunks"] > 0
    assert engine.counts["preemptions"] > 0


def test_invariant_bf16_does_not_depend_on_batch_or_replica(directory: pathlib.Path) -> None:
    prompts = prompts_of(directory)[:8]
    model = load(directory, torch.bfloat16)
    whole: dict[str, list[tuple[int, float | None]]] = {}
    for size in (1, 8):
        engine = make_engine(model, batch_invariant=True, max_batch_sequences=size)
        for index, prompt in enumerate(prompts):
            engine.add(job(str(index), prompt, NUM_TOKENS))
        found = {
            name: [(output.token_id, output.logprob) for output in outputs]
            for name, outputs in run_outputs(engine).items()
        }
        assert found == (whole or found)
        whole = found
    engine = make_engine(model, batch_invariant=True)
    for index, prompt in enumerate(prompts):
        emitted = tuple(token for token, _ in whole[str(index)][: index + 1])
        engine.add(job(str(index), prompt, NUM_TOKENS, emitted_ids=emitted))
    for name, outputs in run_outputs(engine).items():
        resumed = [(output.token_id, output.logprob) for output in outputs]
        assert resumed == whole[name][int(name) + 1 :]
