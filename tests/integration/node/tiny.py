"""A tiny random Llama as a checkpoint on disk, and transformers' own answers for it."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashserve.types import ModelId, ModelSpec

CONTEXT_TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Tiny:
    spec: ModelSpec
    model: LlamaForCausalLM

    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([prompt])
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        continuation: list[int] = output[0, len(prompt) :].tolist()
        return continuation


def make_tiny(directory: pathlib.Path, name: str, seed: int = 0) -> Tiny:
    """Saves a float32 model whose weights are so large that its choices vary."""
    config = LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKENS,
        pad_token_id=0,
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape) * 1.5 * parameter.shape[-1] ** -0.5)
    path = directory / name
    model.save_pretrained(path)
    size = (path / "model.safetensors").stat().st_size
    return Tiny(ModelSpec(ModelId(name), str(path), size), model)


def change_config(spec: ModelSpec, **changes: object) -> None:
    path = pathlib.Path(spec.source) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
