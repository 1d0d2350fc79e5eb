"""What a measured process is told, and what every loader in it may use."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

Loaded = dict[str, torch.Tensor] | nn.Module | None
Load = Callable[[], Loaded]
"""What the clock covers: returns when every byte is resident."""
Setup = Callable[["Job"], Load]
"""What it does itself is outside the clock."""


@dataclasses.dataclass(slots=True)
class Job:
    """One load.

    path: the checkpoint's directory, the prepared file, or for S3 "bucket/prefix". scratch: an
    empty directory of its own on the same disk. options: whatever else the loader needs. extras:
    what the loader measured beside the load.
    """

    loader: str
    path: str
    scratch: str
    config: dict[str, Any]
    digests: dict[str, str]
    env: dict[str, str] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    extras: dict[str, float] = dataclasses.field(default_factory=dict)

    def weight_files(self) -> list[str]:
        return sorted(map(str, pathlib.Path(self.path).glob("*.safetensors")))


def touched(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Reads a byte of every page, which makes a lazy mapping bring it."""
    for tensor in tensors.values():
        tensor.view(torch.uint8).flatten()[:: os.sysconf("SC_PAGE_SIZE")].sum()
    return tensors


def touched_model(model: nn.Module) -> nn.Module:
    touched(model.state_dict())
    return model


def tensors_in(file: torch.Tensor) -> dict[str, torch.Tensor]:
    """Views of the tensors of a bf16 safetensors file that lies in memory.

    Args:
        file: [bytes], uint8.
    """
    (length,) = struct.unpack("<Q", bytes(file[:8].tolist()))
    header = json.loads(file[8 : 8 + length].numpy().tobytes())
    header.pop("__metadata__", None)
    return {
        name: file[8 + length + entry["data_offsets"][0] : 8 + length + entry["data_offsets"][1]]
        .view(torch.bfloat16)
        .view(entry["shape"])
        for name, entry in header.items()
    }


def faulted_buffer(num_bytes: int) -> torch.Tensor:
    """Private memory whose every page is there: [num_bytes], uint8."""
    return torch.empty(num_bytes, dtype=torch.uint8).fill_(1)


def pieces(num_bytes: int, piece_bytes: int) -> Iterable[tuple[int, int]]:
    """Begin and length of each piece."""
    for index in range(math.ceil(num_bytes / piece_bytes)):
        begin = index * piece_bytes
        yield begin, min(piece_bytes, num_bytes - begin)
