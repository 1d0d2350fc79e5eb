"""What the accelerator's benchmark measures on: a random checkpoint in an arena, and a device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import mmap
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from flashserve.errors import UnavailableError
from flashserve.node.residents import Residents
from flashserve.store.checkpoint.order import groups
from flashserve.store.device.bind import bind
from flashserve.store.device.copier import DeviceCopier
from flashserve.store.device.regions import RegisteredArena, address_of
from flashserve.store.dram.arena import attach
from flashserve.types import TensorSlice

SEED = 0
GIB, MIB = 1 << 30, 1 << 20
# Where a safetensors header ends is only a multiple of 8; the device must not mind.
_FIRST_OFFSET = 12_008
_MADV_POPULATE_WRITE = 23


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: the model's shape and the amounts that are moved."""

    config: dict[str, Any]
    prompt_tokens: int
    registered_bytes: int
    piece_bytes: int
    copy_sizes: tuple[int, ...]
    copied_bytes: int
    matrix: int
    kv_bytes: int
    region_sizes: tuple[int, ...]


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
FULL = Scale(
    LLAMA_8B,
    512,
    8 * GIB,
    GIB,
    tuple(size * MIB for size in (1, 4, 16, 64, 256)),
    GIB,
    8192,
    GIB,
    (64 * MIB, GIB, 16 * GIB),
)
QUICK = dataclasses.replace(
    FULL,
    config={**LLAMA_8B, "num_hidden_layers": 8},
    registered_bytes=2 * GIB,
    region_sizes=(64 * MIB, GIB, 4 * GIB),
)
DRY = Scale(TINY, 16, MIB, 64 << 10, (4096, 65536), MIB, 64, MIB, (MIB,))


class Memory:
    """A memfd, populated, mapped writable here and read-only as a worker has it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = -(-num_bytes // (2 * MIB)) * 2 * MIB
        fd = os.memfd_create("gpu-loader", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.num_bytes)
            self.writable = mmap.mmap(fd, self.num_bytes)
            self.read_only = attach(fd, self.num_bytes)
        finally:
            os.close(fd)
        self.bytes = np.frombuffer(self.writable, np.uint8)
        try:
            self.writable.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # a sandbox's kernel may not know it
            self.bytes[:: mmap.PAGESIZE] = 0


class Bench:
    """The device, and what earlier items leave for later ones."""

    def __init__(self, copier: DeviceCopier, scale: Scale) -> None:
        self.copier = copier
        self.device = copier.device
        self.scale = scale
        self.ceiling = 0.0  # bytes per second, once it is measured

    @functools.cached_property
    def config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(**self.scale.config)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        return model.eval()

    @functools.cached_property
    def tensors(self) -> tuple[TensorSlice, ...]:
        """As a safetensors file has them: one after another, sorted by name."""
        found, offset = [], _FIRST_OFFSET
        for name, value in sorted(self.skeleton().state_dict().items()):
            found.append(TensorSlice(name, "BF16", tuple(value.shape), offset, 2 * value.numel()))
            offset += 2 * value.numel()
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return groups(tensor.name for tensor in self.tensors)

    @functools.cached_property
    def memory(self) -> Memory:
        """The checkpoint: norms of one, everything else normal; made on the device."""
        memory = Memory(self.tensors[-1].offset + self.tensors[-1].num_bytes)
        generator = torch.Generator(self.device).manual_seed(SEED)
        for tensor in self.tensors:
            values = torch.ones(tensor.shape, dtype=torch.bfloat16, device=self.device)
            if len(tensor.shape) > 1:
                values.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
            there = memory.bytes[tensor.offset : tensor.offset + tensor.num_bytes]
            there[:] = values.flatten().view(torch.uint8).cpu().numpy()
        return memory

    @functools.cached_property
    def registered(self) -> tuple[RegisteredArena, mmap.mmap, str]:
        """The arena as a worker has it; where that cannot be registered, the writable mapping."""
        memory, arena = self.memory, None
        for name in ("read_only", "writable"):
            mapping = getattr(memory, name)
            arena = RegisteredArena(
                self.copier,
                address_of(mapping),
                memory.num_bytes,
                piece_bytes=self.scale.piece_bytes,
            )
            if arena.refusal is None:
                return arena, mapping, name
            arena.close()
        assert arena is not None
        raise UnavailableError(f"the arena cannot be registered: {arena.refusal}")

    @functools.cached_property
    def residents(self) -> Residents:
        return Residents(self.copier, self.registered[0])

    def take(self, model: nn.Module | None = None) -> nn.Module:
        """The model on the device with every copy started: loaded, or woken if it slept."""
        resident = self.residents.take(
            "model",
            self.tensors,
            self.groups,
            lambda: self.bound(model or self.skeleton()),
            num_open=len(self.groups),
        )
        return resident.model

    def release(self) -> None:
        """Leaves the device empty for the next item, whatever this one did."""
        if "residents" in self.__dict__:
            self.residents.close()

    def bound(self, model: nn.Module) -> nn.Module:
        bind(model, self.tensors, self.registered[1], None)
        return model

    def synchronize(self) -> None:
        self.copier.synchronize()

    @functools.cached_property
    def prompt(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(
            self.config.vocab_size, (1, self.scale.prompt_tokens), generator=generator
        )
        return ids.to(self.device)

    @torch.inference_mode()
    def prefill(self, model: nn.Module) -> torch.Tensor:
        """The last logits, after the device has computed them."""
        logits = model(self.prompt, use_cache=False, logits_to_keep=1).logits[0, -1]
        logits.argmax().item()
        return logits

    @contextlib.contextmanager
    def gated(self, model: nn.Module) -> Iterator[None]:
        """Each part of the model waits for its own group of weights, and for no later one."""
        resident = self.residents.awake()
        parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
        hooks = [
            part.register_forward_pre_hook(lambda *_, group=group: resident.residence.wait(group))
            for group, part in enumerate(parts)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
