"""Whether many adapters in one batch answer as PEFT does, token for token."""

from __future__ import annotations

import json
import mmap
import pathlib
import random
import warnings
from typing import Any

import peft
import torch
import transformers

from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.engine.engine import Engine
from flashserve.engine.runner import allocate_pool
from flashserve.messages.work import AdapterImage, GenerateJob, LoraLayer
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.device.bind import bind
from flashserve.types import AdapterId, SamplingParams, TensorSlice

NUM_ADAPTERS = 8
NUM_TOKENS = 16
RANKS = (4, 8, 16, 64)


def is_exact(directory: pathlib.Path, seed: int) -> bool:
    """Whether a batch of adapters and the base answers one prompt as PEFT's mixed batch does.

    False also if the adapters all answer as the base does, which would compare nothing.
    """
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = peft.get_peft_model(theirs, _config(0), "a0")
        for number in range(1, NUM_ADAPTERS):
            adapted.add_adapter(f"a{number}", _config(number))
    tensors = {}
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3 * parameter.shape[1] ** -0.5)
            tensors[name] = parameter.data
    draw = random.Random(seed)
    prompt = [draw.randrange(100, 49000) for _ in range(12)]
    names = [f"a{number}" for number in range(NUM_ADAPTERS)] + ["__base__"]
    wanted = (
        adapted.eval()
        .generate(
            input_ids=torch.tensor([prompt] * len(names)),
            attention_mask=torch.ones(len(names), len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            adapter_names=names,
        )[:, len(prompt) :]
        .tolist()
    )
    found = _float32_tokens(directory, tensors, names, prompt)
    return found == wanted and any(tokens != wanted[-1] for tokens in wanted)


def _float32_tokens(
    directory: pathlib.Path, tensors: dict[str, torch.Tensor], names: list[str], prompt: list[int]
) -> list[list[int]]:
    """FlashServe's answers to `prompt`. Args: tensors: of PEFT, by its names for them."""
    model = loading.build_skeleton(
        json.loads((directory / "config.json").read_text()), torch.float32
    )
    slices = tuple(
        TensorSlice(item.name, item.dtype, item.shape, item.begin, item.end - item.begin)
        for item in read_layout(directory).tensors
    )
    with (directory / "model.safetensors").open("rb") as file:
        image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    bind(model, slices, image, torch.float32)
    engine = Engine(
        model,
        EngineSettings(reuse_prefixes=False),
        allocate_pool(128 << 20),
        read_adapter=lambda item: tensors[item.name],
    )
    for name in names[:-1]:
        layers = []
        marker = f".lora_A.{name}.weight"
        for key in (key for key in tensors if key.endswith(marker)):
            module = key.removeprefix("base_model.model.").removesuffix(marker)
            pair = (_slice(tensors, key), _slice(tensors, key.replace(".lora_A.", ".lora_B.")))
            layers.append(LoraLayer(module, 2.0, *pair))
        engine.put_adapter(AdapterImage(AdapterId(name), tuple(layers)))
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for name in names:
        adapter = None if name == "__base__" else AdapterId(name)
        engine.add(GenerateJob(name, tuple(prompt), params, adapter_id=adapter))
    found: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_work:
        for name, output in engine.step():
            found[name].append(output.token_id)
    return [found[name] for name in names]


def _config(number: int) -> peft.LoraConfig:
    rank = RANKS[number % len(RANKS)]
    return peft.LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _slice(tensors: dict[str, torch.Tensor], key: str) -> TensorSlice:
    return TensorSlice(key, "F32", tuple(tensors[key].shape), 0, 0)
