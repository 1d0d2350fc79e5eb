"""Small checkpoints, good and bad."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def craft(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """A safetensors file with any header: an object, or bytes as they are."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(encoded) if length is None else length) + encoded + data)
    return path


def write_checkpoint(
    directory: Path,
    shards: dict[str, dict[str, np.ndarray]] | int = 1000,
    config: object = CONFIG,
    seed: int = 0,
) -> Path:
    """A directory with a config and weight files; a number asks for so many random bytes."""
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(shards, int):
        data = np.random.default_rng(seed).integers(0, 256, shards, dtype=np.uint8)
        shards = {"model.safetensors": {"weight": data}}
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, directory / name)
    if list(shards) != ["model.safetensors"]:
        placed = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        write_index(directory, {"metadata": {}, "weight_map": placed})
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_index(directory: Path, index: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(name="craft")
def _craft() -> Callable[..., Path]:
    return craft


@pytest.fixture(name="write_checkpoint")
def _write_checkpoint() -> Callable[..., Path]:
    return write_checkpoint


@pytest.fixture(name="write_index")
def _write_index() -> Callable[..., None]:
    return write_index


@pytest.fixture
def two_shards() -> dict[str, dict[str, Any]]:
    return {
        "model-00001-of-00002.safetensors": {
            "a": np.arange(6, dtype=np.float32).reshape(2, 3),
            "b": np.arange(5000, dtype=np.int64),
        },
        "model-00002-of-00002.safetensors": {"c": np.array([True, False])},
    }
