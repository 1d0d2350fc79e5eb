"""Looks at the numbers of an adapter: are they finite, and are its copies those of its base?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.adapters.layout import AdapterSnapshot, base_weight, weights_by_module
from flashserve.store.checkpoint.files import shown
from flashserve.store.checkpoint.layout import Layout, TensorEntry

_PIECE_BYTES = 8 << 20
# The bits of an exponent that only infinities and what is no number have all set.
_EXPONENTS = {"F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}


Read = Callable[[TensorEntry], AbstractContextManager[memoryview]]
"""Gives the bytes of a tensor of the adapter."""


def check_values(adapter: AdapterSnapshot, read: Read) -> None:
    """Raises CheckpointError when a value of a layer is no finite number."""
    for layer in adapter.layers:
        for tensor in (layer.a, layer.b):
            with read(tensor) as data:
                if not is_finite(tensor.dtype, data):
                    raise CheckpointError(
                        f"{adapter.uri} has values that are no finite numbers in "
                        f"{shown(tensor.name)}"
                    )


def check_copies(
    adapter: AdapterSnapshot,
    read: Read,
    base: Layout,
    read_base: Callable[[TensorEntry], Iterable[bytes]],
) -> None:
    """Refuses weights of modules that the adapter brings besides its updates, unless they are the
    base's own.

    Raises:
        UnsupportedModelError: they are not.
    """
    weights = weights_by_module(base)
    for module, copy in adapter.copies:
        original = base_weight(weights, module)
        assert original is not None  # check_base has seen it
        with read(copy) as data:
            if not is_copy(copy.dtype, data, original.dtype, read_base(original)):
                raise UnsupportedModelError(
                    f"{adapter.uri} brings weights for {module} that are not its base's: save it "
                    "with save_embedding_layers=False, or merge it and deploy that"
                )


def is_finite(dtype: str, data: memoryview) -> bool:
    """Whether all values of a tensor's bytes are numbers. dtype: F32, F16 or BF16."""
    exponent = _EXPONENTS[dtype]
    for begin in range(0, len(data), _PIECE_BYTES):
        bits = np.frombuffer(data[begin : begin + _PIECE_BYTES], f"<u{ITEM_BYTES[dtype]}")
        if np.any((bits & exponent) == exponent):
            return False
    return True


def is_copy(dtype: str, data: memoryview, original_dtype: str, pieces: Iterable[bytes]) -> bool:
    """Whether a tensor's bytes are those of another one, whose bytes come in `pieces` of any size,
    perhaps rounded to a narrower type on the way.
    """
    done, rest = 0, b""
    item_bytes, original_bytes = ITEM_BYTES.get(dtype), ITEM_BYTES.get(original_dtype)
    if item_bytes is None or original_bytes is None:
        return False
    for piece in pieces:
        whole = rest + piece
        num_items = len(whole) // original_bytes
        rest = whole[num_items * original_bytes :]
        end = done + num_items * item_bytes
        mine = _as_float(dtype, data[done:end])
        theirs = _as_float(original_dtype, memoryview(whole)[: num_items * original_bytes])
        if len(mine) != len(theirs) or not np.array_equal(mine, _rounded(dtype, theirs)):
            return False
        done = end
    return done == len(data) and not rest


def _as_float(dtype: str, data: memoryview) -> npt.NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def _rounded(dtype: str, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """To the nearest value of the type, ties to even."""
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    if dtype == "BF16":
        bits = values.view(np.uint32)
        odd = (bits >> 16) & 1
        return ((bits + 0x7FFF + odd) & 0xFFFF_0000).astype(np.uint32).view(np.float32)
    return values
