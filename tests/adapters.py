"""Small LoRA adapters as PEFT writes them, made with numpy alone: good ones, and ones to break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "bias": "none",
    "base_model_name_or_path": "org/base",
}
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


def linear(module: str, rank: int, in_features: int, out_features: int, seed: int = 0) -> Any:
    """The two tensors of one layer, by their names in the file."""
    rng = np.random.default_rng(seed)
    return {
        f"{PREFIX}{module}.lora_A.weight": rng.normal(size=(rank, in_features)).astype("f4"),
        f"{PREFIX}{module}.lora_B.weight": rng.normal(size=(out_features, rank)).astype("f4"),
    }


def write_adapter(
    directory: Path,
    tensors: dict[str, np.ndarray] | None = None,
    config: object = None,
    *,
    rank: int = 4,
    width: int = 32,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A directory with an adapter: by default of two square layers, `changes` in its config."""
    directory.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = linear(Q0, rank, width, width, seed) | linear(Q1, rank, width, width, seed + 1)
    safetensors.numpy.save_file(tensors, directory / "adapter_model.safetensors")
    config = config or {**CONFIG, "r": rank, **changes}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def write_base(directory: Path, width: int = 32, vocabulary: int = 50, seed: int = 0) -> Path:
    """A model that the default adapter fits, as far as its headers go."""
    directory.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    tensors = {f"{name}.weight": rng.normal(size=(width, width)).astype("f4") for name in (Q0, Q1)}
    tensors["model.embed_tokens.weight"] = rng.normal(size=(vocabulary, width)).astype("f4")
    tensors["model.norm.weight"] = np.ones(width, "f4")
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return directory
