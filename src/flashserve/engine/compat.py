"""Which models are served exactly, decided from config.json alone; the rest is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flashserve.errors import UnsupportedModelError

# architecture -> (model_type, package of transformers with its configuration and modelling code)
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", "llama"),
    "Qwen2ForCausalLM": ("qwen2", "qwen2"),
    "Qwen3ForCausalLM": ("qwen3", "qwen3"),
    "Qwen3MoeForCausalLM": ("qwen3_moe", "qwen3_moe"),
    "MistralForCausalLM": ("mistral", "mistral"),
    "GemmaForCausalLM": ("gemma", "gemma"),
    "Gemma2ForCausalLM": ("gemma2", "gemma2"),
    "Gemma3ForCausalLM": ("gemma3_text", "gemma3"),
}
# Frequencies that depend on the position alone. Those of dynamic and longrope scaling follow the
# longest sequence of a batch, so that one request would change another's answer.
_ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
_LAYER_TYPES = {"full_attention", "sliding_attention"}
_REASONS = {
    "gpt_oss": "its attention sinks are not served",
    "mamba": "its recurrent layers are not served",
    "mamba2": "its recurrent layers are not served",
    "jamba": "its recurrent layers are not served",
    "rwkv": "its recurrent layers are not served",
    "recurrent_gemma": "its recurrent layers are not served",
    "qwen3_next": "its linear attention layers are not served",
    "minimax": "its linear attention layers are not served",
    "t5": "it is an encoder-decoder",
    "bart": "it is an encoder-decoder",
    "gemma3": "it is multimodal; its text model alone (gemma3_text) is served",
}
# Sizes that the code of transformers loops over or multiplies; bounds far above any real model.
_BOUNDS = {
    "num_hidden_layers": 1024,
    "hidden_size": 1 << 17,
    "intermediate_size": 1 << 20,
    "moe_intermediate_size": 1 << 20,
    "num_attention_heads": 1024,
    "num_key_value_heads": 1024,
    "head_dim": 1024,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
    "num_experts": 4096,
    "num_experts_per_tok": 4096,
    "sliding_window": 1 << 27,
}
_REQUIRED = ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size")


def check_config(config: dict[str, Any]) -> str:
    """The architecture's name, if the model that `config` (a config.json) describes is served.

    Raises:
        UnsupportedModelError: it would not be served exactly, or a size in it makes no sense; one
            line that names what.
    """
    if "auto_map" in config:
        raise UnsupportedModelError("config.json has auto_map: code of a checkpoint is never run")
    architecture = _architecture(config)
    for problem in _problems(config):
        raise UnsupportedModelError(f"{architecture}: {problem}")
    return architecture


def _architecture(config: dict[str, Any]) -> str:
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    model_type = config.get("model_type")
    if not isinstance(name, str):
        raise UnsupportedModelError("config.json names no architecture in architectures")
    if name not in ARCHITECTURES:
        reason = _REASONS.get(model_type) if isinstance(model_type, str) else None
        if config.get("is_encoder_decoder") is True:
            reason = "it is an encoder-decoder"
        served = ", ".join(ARCHITECTURES)
        raise UnsupportedModelError(
            f"architecture {name[:80]} is not supported"
            + (f": {reason}" if reason else f"; supported are {served}")
        )
    if model_type != ARCHITECTURES[name][0]:
        raise UnsupportedModelError(
            f"config.json: model_type is {str(model_type)[:80]!r}, "
            f"but {name} goes with {ARCHITECTURES[name][0]!r}"
        )
    return name


def _problems(config: dict[str, Any]) -> Iterator[str]:
    yield from _size_problems(config)
    for rope in _rope_entries(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind not in _ROPE_TYPES:
            yield f"{str(kind)[:40]} rope scaling would not be exact in a batch"
    if config.get("quantization_config") is not None:
        yield "quantized checkpoints (quantization_config) are not supported"
    if config.get("use_bidirectional_attention"):
        yield "bidirectional attention is not supported"
    layer_types = config.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list):
            yield "layer_types is not a list"
        elif unknown := [kind for kind in layer_types if kind not in _LAYER_TYPES]:
            yield f"layers of type {str(unknown[0])[:40]} are not supported"


def _size_problems(config: dict[str, Any]) -> Iterator[str]:
    for name, bound in _BOUNDS.items():
        value = config.get(name)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= bound:
            yield f"{name} is {str(value)[:40]}, not a number from 1 to {bound}"
            return
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        yield f"num_attention_heads {heads} is no multiple of num_key_value_heads {groups}"


def _rope_entries(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every description of rotary frequencies: by old and new name, flat or for each layer type."""
    for name in ("rope_scaling", "rope_parameters"):
        value = config.get(name)
        if isinstance(value, dict):
            yield value
            yield from (entry for entry in value.values() if isinstance(entry, dict))
