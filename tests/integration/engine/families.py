"""Tiny random models of every served family, and transformers' own answer for each."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import nn

from flashserve.engine import loading
from flashserve.engine.compat import ARCHITECTURES

VOCABULARY = 300
_BASE: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LOCAL_GLOBAL = ["sliding_attention", "full_attention"]


def _config(architecture: str, **changes: Any) -> dict[str, Any]:
    model_type, _ = ARCHITECTURES[architecture]
    return {**_BASE, "architectures": [architecture], "model_type": model_type, **changes}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _config("LlamaForCausalLM", tie_word_embeddings=True),
    "llama-bias": _config("LlamaForCausalLM", attention_bias=True, mlp_bias=True),
    "llama3-rope": _config(
        "LlamaForCausalLM",
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-linear-rope": _config(
        "LlamaForCausalLM", rope_scaling={"rope_type": "linear", "factor": 4.0}
    ),
    "llama-yarn": _config(
        "LlamaForCausalLM",
        rope_scaling={
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    ),
    "qwen2": _config("Qwen2ForCausalLM"),
    "qwen2-sliding": _config(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=24, max_window_layers=1
    ),
    "qwen3": _config("Qwen3ForCausalLM"),
    "qwen3-moe": _config(
        "Qwen3MoeForCausalLM",
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        norm_topk_prob=True,
        mlp_only_layers=[1],
    ),
    "mistral": _config("MistralForCausalLM", sliding_window=20),
    "gemma": _config("GemmaForCausalLM"),
    "gemma2": _config(
        "Gemma2ForCausalLM",
        sliding_window=20,
        layer_types=_LOCAL_GLOBAL,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0,
    ),
    "gemma3": _config(
        "Gemma3ForCausalLM",
        sliding_window=20,
        layer_types=_LOCAL_GLOBAL,
        query_pre_attn_scalar=24,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}


@functools.cache
def reference(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' own model with weights so large that its choices vary."""
    config = FAMILIES[family]
    architecture = config["architectures"][0]
    package = ARCHITECTURES[architecture][1]
    module = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    model_class = getattr(module, architecture)
    parsed = model_class.config_class.from_dict(config)
    attn = "eager" if family == "gemma2" else "sdpa"  # its soft-capping needs eager
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(parsed, attn_implementation=attn, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            scale = 0.1 if parameter.dim() == 1 else 1.5 * parameter.shape[-1] ** -0.5
            if "embed" in name and "gemma" in family:  # which multiplies by its square root
                scale /= parameter.shape[-1] ** 0.5
            offset = 1.0 if "norm" in name and "gemma" not in family else 0.0
            parameter.copy_(noise * scale + offset)
    return model.eval()


@functools.cache
def served(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Our model with the reference's weights, under the names that its checkpoint would have."""
    model = loading.build_skeleton(FAMILIES[family], dtype)
    fill(model, reference(family, dtype))
    return model


def fill(model: nn.Module, source: nn.Module) -> None:
    """Gives a skeleton the weights and buffers of transformers' module."""
    model.load_state_dict(checkpoint(source), assign=True, strict=False)
    model.tie_weights()
    for name, value in source.named_buffers():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Buffer(value.clone(), persistent=False))
    assert not [name for name, value in model.state_dict().items() if value.is_meta]


def checkpoint(source: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors as a checkpoint stores them: experts apart, tied ones once."""
    tensors = {}
    for name, value in source.state_dict().items():
        stem, _, leaf = name.rpartition(".experts.")
        if leaf == "gate_up_proj":
            for index, both in enumerate(value):
                gate, up = both.chunk(2)
                tensors[f"{stem}.experts.{index}.gate_proj.weight"] = gate.contiguous()
                tensors[f"{stem}.experts.{index}.up_proj.weight"] = up.contiguous()
        elif leaf == "down_proj":
            for index, down in enumerate(value):
                tensors[f"{stem}.experts.{index}.down_proj.weight"] = down.contiguous()
        elif not (name == "lm_head.weight" and source.config.tie_word_embeddings):
            tensors[name] = value
    return tensors


def generate(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """transformers' greedy continuation of one prompt, alone."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    continuation: list[int] = output[0, len(prompt) :].tolist()
    return continuation
