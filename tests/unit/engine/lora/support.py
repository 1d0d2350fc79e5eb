"""Random adapters of a small model, as images and as tensors."""

from __future__ import annotations

import dataclasses
import functools
import zlib

import torch
from torch import nn

from flashserve.engine import loading
from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.targets import Target, Targets
from flashserve.messages.work import AdapterImage, LoraLayer
from flashserve.types import AdapterId, TensorSlice

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
FUSED = (ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@functools.cache
def model(width: int = 64) -> nn.Module:
    """Two layers; with 64 all sizes are whole pages, with 24 none is."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2 * width,
        "intermediate_size": 3 * width,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "vocab_size": 1000,
        "max_position_embeddings": 64,
    }
    return loading.build_skeleton(config, torch.float32)


@functools.cache
def targets(width: int = 64) -> Targets:
    return Targets(model(width))


def groups(width: int = 64) -> list[tuple[Target, ...]]:
    by_name = {target.name: target for _, _, target in targets(width).linears()}
    return [tuple(by_name[name] for name in names) for names in FUSED]


@dataclasses.dataclass
class Adapter:
    """weights: A, B and the scaling of each module."""

    weights: dict[str, tuple[torch.Tensor, torch.Tensor, float]]
    image: AdapterImage
    tensors: dict[str, torch.Tensor]


@functools.cache
def make_adapter(
    name: str,
    rank: int,
    *,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    modules: tuple[str, ...] | None = None,
    scaling: float = 1.5,
) -> Adapter:
    """Args: modules: full names; all linear layers of the decoder layers if not given."""
    chosen = modules or tuple(full for full, _, _ in targets(width).linears())
    draw = torch.Generator().manual_seed(zlib.crc32(f"{name} {rank}".encode()))
    adapter = Adapter({}, AdapterImage(AdapterId(name), ()), {})
    layers = []
    for module in chosen:
        place = targets(width).place(module)
        assert place is not None
        inside, outside = place[1].in_features, place[1].out_features
        a = (torch.randn(rank, inside, generator=draw) * inside**-0.5).to(dtype)
        b = (torch.randn(outside, rank, generator=draw) * rank**-0.5).to(dtype)
        adapter.weights[module] = (a, b, scaling)
        slices = []
        for leaf, tensor in (("A", a), ("B", b)):
            key = f"{name}/{module}.{leaf}"
            adapter.tensors[key] = tensor
            num_bytes = tensor.numel() * tensor.element_size()
            slices.append(TensorSlice(key, _NAMES[dtype], tuple(tensor.shape), 0, num_bytes))
        layers.append(LoraLayer(module, scaling, *slices))
    adapter.image = AdapterImage(AdapterId(name), tuple(layers))
    return adapter


class Arena:
    """Gives the tensors of the adapters that were put into it."""

    def __init__(self, *adapters: Adapter) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self.num_reads = 0
        for adapter in adapters:
            self.put(adapter)

    def put(self, adapter: Adapter) -> None:
        self._tensors.update(adapter.tensors)

    def read(self, tensor: TensorSlice) -> torch.Tensor:
        self.num_reads += 1
        return self._tensors[tensor.name]


def make_memory(
    arena: Arena, dtype: torch.dtype = torch.float32, *, width: int = 64, num_bytes: int = 8 << 20
) -> AdapterMemory:
    device = torch.device("cpu")
    return AdapterMemory(targets(width), num_bytes, dtype, device, arena.read)


def load(memory: AdapterMemory, adapter: Adapter) -> Placed:
    placed = memory.place(adapter.image)
    assert placed is not None
    memory.fill(placed, adapter.image)
    return placed
