"""The tensors of a mapped checkpoint for frameworks other than ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flashserve.errors import ConflictError
from flashserve.store.checkpoint.layout import DTYPE_BITS
from flashserve.store.handout.mapped import MappedModel
from flashserve.types import TensorSlice

if TYPE_CHECKING:
    import torch

_NUMPY: dict[str, type[np.generic]] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
    "C64": np.complex64,
}
_BITS: dict[int, type[np.generic]] = {8: np.uint8, 16: np.uint16}


class RawTensor:
    """A tensor of a type that numpy lacks. dtype is the safetensors name, such as BF16."""

    def __init__(self, owner: OpenTensors, entry: TensorSlice) -> None:
        self._owner = owner
        self._entry = entry
        self.dtype = entry.dtype
        self.shape = entry.shape

    @property
    def data(self) -> memoryview:
        """Its bytes, read-only."""
        return self._owner.data(self._entry)

    def numpy(self) -> npt.NDArray[Any]:
        """Its bit patterns as unsigned integers of the same width; read-only.

        A type narrower than a byte comes as flat bytes.
        """
        kind = _BITS.get(DTYPE_BITS[self.dtype])
        if kind is None:
            return np.frombuffer(self.data, np.uint8)
        return np.frombuffer(self.data, kind).reshape(self.shape)

    def torch(self) -> torch.Tensor:
        """The same memory as a tensor; writing to it copies its pages and reaches nobody else.

        Raises:
            UnsupportedModelError: torch has no such type.
        """
        from flashserve.pretrained import as_tensor

        return as_tensor(self._entry, self._owner.mapped().memory)

    def __repr__(self) -> str:
        return f"RawTensor(dtype={self.dtype!r}, shape={self.shape})"


class OpenTensors(Mapping[str, "npt.NDArray[Any] | RawTensor"]):
    """Name to tensor, in the order of the files, until it is closed."""

    def __init__(self, mapped: MappedModel) -> None:
        self._uri = mapped.grant.uri
        self._entries = {tensor.name: tensor for tensor in mapped.grant.tensors}
        self._mapped: MappedModel | None = mapped

    def __getitem__(self, name: str) -> npt.NDArray[Any] | RawTensor:
        self.mapped()
        entry = self._entries[name]
        if kind := _NUMPY.get(entry.dtype):
            return np.frombuffer(self.data(entry), kind).reshape(entry.shape)
        return RawTensor(self, entry)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def data(self, entry: TensorSlice) -> memoryview:
        """The tensor's bytes, read-only.

        Raises:
            ConflictError: the snapshot is closed.
        """
        memory = memoryview(self.mapped().memory).toreadonly()
        return memory[entry.offset : entry.offset + entry.num_bytes]

    def mapped(self) -> MappedModel:
        """What lies in memory.

        Raises:
            ConflictError: the snapshot is closed.
        """
        if self._mapped is None:
            raise ConflictError(f"the snapshot of {self._uri} is closed")
        return self._mapped

    def close(self) -> None:
        """Ends the lease; more than once does no harm."""
        if self._mapped is not None:
            self._mapped.release()
            self._mapped = None
