"""Damaged and unsuitable checkpoints, made from the real one's small files."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
WEIGHTS = "model.safetensors"

Damage = Callable[[Path, Path], None]


def damaged(checkpoint: Path, directory: Path, damage: Damage) -> Path:
    """A copy of `checkpoint` in `directory`; its weights are what `damage` puts there."""
    directory.mkdir()
    for name in SMALL_FILES:
        shutil.copy(checkpoint / name, directory / name)
    damage(checkpoint, directory)
    return directory


def zero_weights(checkpoint: Path, directory: Path) -> None:
    """Weights of the right names and shapes that take no space."""
    _write_sparse(checkpoint, directory, *read_header(checkpoint))


def truncated(checkpoint: Path, directory: Path) -> None:
    with (checkpoint / WEIGHTS).open("rb") as whole:
        (directory / WEIGHTS).write_bytes(whole.read(1 << 20))


def overlapping(checkpoint: Path, directory: Path) -> None:
    header, data_begin = read_header(checkpoint)
    names = [name for name in header if name != "__metadata__"]
    first, second = names[0], names[1]
    length = header[second]["data_offsets"][1] - header[second]["data_offsets"][0]
    begin = header[first]["data_offsets"][0]
    header[second]["data_offsets"] = [begin, begin + length]
    _write_sparse(checkpoint, directory, header, data_begin)


def out_of_range(checkpoint: Path, directory: Path) -> None:
    header, data_begin = read_header(checkpoint)
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"] = [offset + (1 << 40) for offset in header[name]["data_offsets"]]
    _write_sparse(checkpoint, directory, header, data_begin)


def endless_header(_checkpoint: Path, directory: Path) -> None:
    (directory / WEIGHTS).write_bytes(struct.pack("<Q", 1 << 63) + b"{}" + bytes(64))


def unsupported_architecture(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    _edit_config(directory, architectures=["MambaForCausalLM"], model_type="mamba")


def unsupported_rope(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    _edit_config(directory, rope_scaling={"rope_type": "dynamic", "factor": 2.0})


def config_mismatch(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    _edit_config(directory, intermediate_size=999)


def missing_layer(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    _edit_config(directory, num_hidden_layers=31)


def remote_code(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    _edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling.Evil"})


def broken_config(checkpoint: Path, directory: Path) -> None:
    zero_weights(checkpoint, directory)
    (directory / "config.json").write_text("{not json")


def pickle_only(_checkpoint: Path, directory: Path) -> None:
    (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def read_header(checkpoint: Path) -> tuple[dict[str, Any], int]:
    """The safetensors header, and where the data begins in the file."""
    with (checkpoint / WEIGHTS).open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(length)), 8 + length


def _write_sparse(
    checkpoint: Path, directory: Path, header: dict[str, Any], data_begin: int
) -> None:
    """Weights with another header and as many bytes of data, which are a hole in the file."""
    encoded = json.dumps(header).encode()
    data_bytes = (checkpoint / WEIGHTS).stat().st_size - data_begin
    with (directory / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(file.tell() + data_bytes)


def _edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
