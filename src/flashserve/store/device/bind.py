"""Gives a module its weights: on a CPU, views of the arena's own bytes.

Only workers import this module; the rest of the store knows no tensor library.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import operator
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import nn

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.types import TensorSlice

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

# Old checkpoints hold a frequency table per layer; it follows from the config.
_IGNORED = (r"rotary_emb\.inv_freq",)


class Pending:
    """What a bound model still lacks: copies, made once the bytes of their group are there."""

    def __init__(self, copies: Iterable[tuple[int, Callable[[], None]]]) -> None:
        self._copies = sorted(copies, key=operator.itemgetter(0), reverse=True)

    def fill(self, num_open: int) -> None:
        """Makes the copies whose bytes are in the groups [0, num_open), each once."""
        while self._copies and self._copies[-1][0] < num_open:
            _, copy = self._copies.pop()
            copy()


def bind(
    model: nn.Module,
    tensors: tuple[TensorSlice, ...],
    arena: memoryview | mmap.mmap,
    dtype: torch.dtype | None,
) -> None:
    """Gives every parameter and buffer of `model`, built on the meta device, its value.

    A parameter becomes a view of `arena` when its tensor is aligned to its element size and has
    the wanted type, and a copy otherwise. Weights of a mixture's experts that the model holds
    fused and the checkpoint does not are copied together. Tied weights are tied, buffers that no
    checkpoint holds are computed, and requires_grad stays as it was.

    Args:
        model: a transformers model whose parameters are on the meta device.
        tensors: their offsets are relative to `arena`.
        arena: every view keeps it from being closed.
        dtype: what floating-point tensors are converted to; None leaves each as it is stored.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or out of the arena.
        UnsupportedModelError: a type, or a buffer that no checkpoint holds, is not known.
    """
    state, copies = _place_all(model, tensors, arena, dtype)
    for _, copy in copies:
        copy()
    _assign(model, state, keep_apart=_complete_tied(model, state, compare=True))


def bind_arriving(
    model: nn.Module,
    tensors: tuple[TensorSlice, ...],
    arena: memoryview | mmap.mmap,
    dtype: torch.dtype | None,
    group_of: Mapping[str, int],
) -> Pending:
    """As `bind`, while the bytes are still on their way: reads none of them.

    Only tied weights that the checkpoint holds twice may differ from it: whether they are equal
    is not known yet, so each keeps its own.

    Args:
        group_of: the group of every tensor, by name; see store/order.py.
    """
    state, copies = _place_all(model, tensors, arena, dtype)
    _assign(model, state, keep_apart=_complete_tied(model, state, compare=False))
    return Pending((max(group_of[piece.name] for piece in pieces), copy) for pieces, copy in copies)


def unbind(model: nn.Module) -> None:
    """Undoes `bind`: no view of the arena and no copy of it is left in `model`.

    Buffers that were computed stay. Binding it again gives it weights again.
    """
    empty: dict[int, nn.Parameter] = {}  # tied weights stay tied
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) not in empty:
                bare = torch.empty_like(parameter, device="meta")
                empty[id(parameter)] = nn.Parameter(bare, parameter.requires_grad)
            setattr(module, name, empty[id(parameter)])
    stored = set(model.state_dict())
    for name, buffer in list(model.named_buffers()):
        if name in stored:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, torch.empty_like(buffer, device="meta"))


_Copies = list[tuple[tuple[TensorSlice, ...], Callable[[], None]]]


def _place_all(
    model: nn.Module,
    tensors: tuple[TensorSlice, ...],
    arena: memoryview | mmap.mmap,
    dtype: torch.dtype | None,
) -> tuple[dict[str, torch.Tensor], _Copies]:
    """A tensor for each name that the checkpoint holds, and the copies that fill some of them."""
    matched = match(model, tensors)
    memory = _unwarned(arena)
    state: dict[str, torch.Tensor] = {}
    copies: _Copies = []
    for name, expected in model.state_dict(keep_vars=True).items():
        if pieces := matched.get(name):
            state[name], copy = _place(pieces, expected.shape, memory, dtype)
            if copy is not None:
                copies.append((pieces, copy))
            if not state[name].is_floating_point():
                expected.requires_grad_(False)  # torch refuses a gradient to integers
    return state, copies


def _assign(model: nn.Module, state: dict[str, torch.Tensor], *, keep_apart: bool) -> None:
    model.load_state_dict(state, strict=True, assign=True)
    if not keep_apart:
        model.tie_weights()
    _fill_buffers(model)


def reader(arena: memoryview | mmap.mmap) -> Callable[[TensorSlice], torch.Tensor]:
    """Gives single tensors of `arena`, as views where they are aligned; they keep it open.

    What it returns raises CheckpointError for a slice that lies outside.
    """
    memory = _unwarned(arena)

    def read(tensor: TensorSlice) -> torch.Tensor:
        _check_place(tensor, memory)
        return _view(tensor, memory)

    return read


def match(model: nn.Module, tensors: Iterable[TensorSlice]) -> dict[str, tuple[TensorSlice, ...]]:
    """The slices that make up each named parameter of `model`; no bytes are touched.

    One slice as a rule; for fused experts [E, ...] all gate and up slices, or all down slices, in
    the order in which they follow each other. A tied parameter may be absent when its partner is
    there.

    Raises:
        CheckpointError: a tensor is missing, unexpected or of another shape; the message names it.
        UnsupportedModelError: a tensor's type is not known.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    matched: dict[str, tuple[TensorSlice, ...]] = {}
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = _tied_names(model)
    for name, shape in expected.items():
        pieces = _pieces(name, shape, by_name)
        if pieces is None:
            if not any(partner in by_name for partner in tied.get(name, ())):
                raise CheckpointError(f"the checkpoint lacks tensor {name}, which its config needs")
            continue
        _check_shape(name, shape, pieces)
        matched[name] = pieces
    _refuse_unexpected(model, by_name, matched)
    return matched


def _pieces(
    name: str, shape: tuple[int, ...], by_name: dict[str, TensorSlice]
) -> tuple[TensorSlice, ...] | None:
    if tensor := by_name.get(name):
        return (tensor,)
    prefix, _, leaf = name.rpartition(".")
    if not prefix.endswith(".experts") or leaf not in {"gate_up_proj", "down_proj"}:
        return None
    parts = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)
    names = [f"{prefix}.{expert}.{part}.weight" for expert in range(shape[0]) for part in parts]
    if not any(piece in by_name for piece in names):
        return None
    for piece in names:
        if piece not in by_name:
            raise CheckpointError(f"the checkpoint lacks tensor {piece}, which its config needs")
    return tuple(by_name[piece] for piece in names)


def _check_shape(name: str, shape: tuple[int, ...], pieces: tuple[TensorSlice, ...]) -> None:
    """Fused experts [E, rows, columns] are E * k slices [rows / k, columns], one after another."""
    is_fused = pieces[0].name != name
    wanted = (shape[1] * shape[0] // len(pieces), shape[2]) if is_fused else shape
    for piece in pieces:
        if piece.shape != wanted:
            raise CheckpointError(
                f"tensor {piece.name} has shape {list(piece.shape)} in the checkpoint, but its "
                f"config asks for {list(wanted)}"
            )
        if piece.dtype not in TORCH_DTYPES:
            raise UnsupportedModelError(f"tensor {piece.name} has type {piece.dtype}")
        if piece.dtype != pieces[0].dtype:
            raise CheckpointError(
                f"tensors {pieces[0].name} and {piece.name} have different types, "
                f"{pieces[0].dtype} and {piece.dtype}"
            )


def _refuse_unexpected(
    model: nn.Module,
    by_name: dict[str, TensorSlice],
    matched: dict[str, tuple[TensorSlice, ...]],
) -> None:
    used = {piece.name for pieces in matched.values() for piece in pieces}
    own = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    ignored = [re.compile(pattern) for pattern in (*_IGNORED, *own)]
    for name in by_name:
        if name not in used and not any(pattern.search(name) for pattern in ignored):
            raise CheckpointError(f"the checkpoint holds tensor {name}, which its config lacks")


def _tied_pairs(model: nn.Module) -> dict[str, str]:
    """Target to source, as transformers ties them for this model's config."""
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    partners: dict[str, set[str]] = {}
    for target, source in _tied_pairs(model).items():
        partners.setdefault(target, set()).add(source)
        partners.setdefault(source, set()).add(target)
    return partners


def _complete_tied(model: nn.Module, state: dict[str, torch.Tensor], *, compare: bool) -> bool:
    """Gives absent tied weights their partner's tensor; true when two partners differ, or may.

    A checkpoint that holds different values for weights that its config ties is read as
    transformers reads it: they are not tied.

    Args:
        compare: look at the bytes of two that are both there; otherwise they may differ.
    """
    differing = False
    for target, source in _tied_pairs(model).items():
        if target not in state:
            state[target] = state[source]
        elif source not in state:
            state[source] = state[target]
        elif not (compare and torch.equal(state[target], state[source])):
            differing = True
    return differing


def _unwarned(arena: memoryview | mmap.mmap) -> ctypes.Array[ctypes.c_ubyte]:
    """The same memory as a buffer that does not say whether it is read-only.

    torch warns about a read-only buffer, and its warning filter belongs to the whole process.
    Writing through a view of a read-only mapping is a SIGSEGV with the warning or without it.
    """
    mapping = np.frombuffer(arena, np.uint8)

    class Memory(ctypes.c_ubyte * mapping.nbytes):  # type: ignore[misc]
        pass

    address = mapping.__array_interface__["data"][0]
    memory: ctypes.Array[ctypes.c_ubyte] = Memory.from_address(address)
    # A view holds on to its memory, and so to the mapping, which then cannot be closed under it.
    memory.mapping = mapping  # type: ignore[attr-defined]
    return memory


def _place(
    pieces: tuple[TensorSlice, ...],
    shape: torch.Size,
    memory: ctypes.Array[ctypes.c_ubyte],
    dtype: torch.dtype | None,
) -> tuple[torch.Tensor, Callable[[], None] | None]:
    """A view, or room for a copy and what makes it."""
    for piece in pieces:
        _check_place(piece, memory)
    stored = TORCH_DTYPES[pieces[0].dtype]
    wanted = dtype if dtype is not None and stored.is_floating_point else stored
    is_single = pieces[0].shape == tuple(shape)
    if is_single and wanted == stored and _is_aligned(pieces[0], memory):
        return _view(pieces[0], memory), None
    room = torch.empty(shape, dtype=wanted)

    def copy() -> None:
        for row, piece in zip(room.view(len(pieces), *pieces[0].shape), pieces, strict=True):
            row.copy_(_view(piece, memory))

    return room, copy


def _check_place(tensor: TensorSlice, memory: ctypes.Array[ctypes.c_ubyte]) -> None:
    begin, end = tensor.offset, tensor.offset + tensor.num_bytes
    num_bytes = math.prod(tensor.shape) * TORCH_DTYPES[tensor.dtype].itemsize
    if begin < 0 or end > len(memory) or num_bytes != tensor.num_bytes:
        raise CheckpointError(f"tensor {tensor.name} does not lie at bytes {begin} to {end}")


def _is_aligned(tensor: TensorSlice, memory: ctypes.Array[ctypes.c_ubyte]) -> bool:
    address = ctypes.addressof(memory) + tensor.offset
    return not address % int(TORCH_DTYPES[tensor.dtype].itemsize)


def _view(tensor: TensorSlice, memory: ctypes.Array[ctypes.c_ubyte]) -> torch.Tensor:
    """The tensor's bytes as they lie in memory, or a copy where they are not aligned.

    Every view has a storage of its own, so that nothing that walks storages (saving, copying,
    finding shared weights) sees the whole arena.
    """
    dtype = TORCH_DTYPES[tensor.dtype]
    count, begin = math.prod(tensor.shape), tensor.offset
    if count == 0:
        return torch.empty(tensor.shape, dtype=dtype)
    if not _is_aligned(tensor, memory):
        aligned = bytearray(memoryview(memory).cast("B")[begin : begin + tensor.num_bytes])
        return torch.frombuffer(aligned, dtype=dtype).view(tensor.shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(tensor.shape)


def _fill_buffers(model: nn.Module) -> None:
    """Computes the buffers that no checkpoint holds, in place of their meta stand-ins.

    transformers' own initialiser is not asked: it draws random weights into whatever it takes to
    be uninitialised, and here the weights are somebody else's read-only memory.
    """
    for path, module in model.named_modules():
        missing = {
            name: value for name, value in module.named_buffers(recurse=False) if value.is_meta
        }
        if not missing:
            continue
        if any(name.endswith("inv_freq") for name in missing) and hasattr(module, "config"):
            fresh = dict(type(module)(module.config).named_buffers(recurse=False))
        elif "embed_scale" in missing and hasattr(module, "scalar_embed_scale"):
            fresh = {"embed_scale": torch.tensor(module.scalar_embed_scale)}
        else:
            fresh = {}
        for name, value in missing.items():
            if name not in fresh:
                raise UnsupportedModelError(f"buffer {path}.{name} cannot be rebuilt")
            setattr(module, name, fresh[name].to(value.dtype))
