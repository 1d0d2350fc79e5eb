"""Where each tensor of a safetensors checkpoint lies: headers read, nothing believed.

A file is an 8-byte little-endian header length, a JSON header, and the data area, which the
tensors tile without gap or overlap. A sharded checkpoint has several files and an index of them.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import math
import struct
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.files import CheckpointFiles, DirectoryFiles, one_line, shown
from flashserve.store.checkpoint.naming import WeightFiles, find_weights

MAX_HEADER_BYTES = 32 << 20
FILE_ALIGNMENT = 4096
"""Files lie so aligned in memory, one after another: O_DIRECT can read each into its place."""

_LENGTH = struct.Struct("<Q")

DTYPE_BITS: dict[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}

_Size = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


@dataclasses.dataclass(frozen=True, slots=True)
class FileEntry:
    name: str
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor at the bytes [begin, end) of the file `file_index`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file_index: int
    begin: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """The files of a checkpoint, and its tensors in the order in which they lie in them."""

    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.num_bytes for file in self.files)

    @property
    def file_offsets(self) -> tuple[int, ...]:
        """Where each file starts in the memory image of the checkpoint."""
        return tuple(itertools.accumulate(map(_padded, self.files[:-1]), initial=0))

    @property
    def image_bytes(self) -> int:
        """Bytes of the memory image: the files one after another, each at its alignment."""
        return sum(map(_padded, self.files))


def _padded(file: FileEntry) -> int:
    return -(-file.num_bytes // FILE_ALIGNMENT) * FILE_ALIGNMENT


class _Header(msgspec.Struct, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=64)]
    data_offsets: tuple[_Size, _Size]


def read_layout(files: CheckpointFiles | Path) -> Layout:
    """The layout of a checkpoint, from model.safetensors or the shards of the index.

    Args:
        files: of the checkpoint, or the directory where they are.

    Raises:
        CheckpointError: there is none, or a file is damaged or contradicts another; one line that
            names the file and the reason.
        SourceError: a file cannot be had.
    """
    if isinstance(files, Path):
        files = DirectoryFiles(files)
    return _join(files, find_weights(files))


def _join(files: CheckpointFiles, weights: WeightFiles) -> Layout:
    entries: list[FileEntry] = []
    tensors: dict[str, TensorEntry] = {}
    for index, name in enumerate(weights.names):
        num_bytes, found = _read_file(files, name, index)
        entries.append(FileEntry(name, num_bytes))
        for tensor in found:
            if tensor.name in tensors or weights.placed.get(tensor.name, name) != name:
                raise CheckpointError(
                    f"{files.place}/{name} holds tensor {shown(tensor.name)}, which belongs to "
                    "another shard"
                )
            tensors[tensor.name] = tensor
    for wanted, name in weights.placed.items():
        if wanted not in tensors:
            raise CheckpointError(
                f"{files.place}/{name} lacks tensor {shown(wanted)}, which "
                f"{weights.index_name} places there"
            )
    return Layout(tuple(entries), tuple(tensors.values()))


def _read_file(files: CheckpointFiles, name: str, index: int) -> tuple[int, list[TensorEntry]]:
    path = f"{files.place}/{name}"
    try:
        file, num_bytes = files.open(name)
        with file:
            header = _read_header(file, num_bytes)
        return num_bytes, _entries(header, index, num_bytes)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
    except _DamageError as error:
        raise CheckpointError(f"{path} {error}") from None


class _DamageError(Exception):
    """What is wrong with the file at hand; the caller knows its name."""


def _read_header(file: BinaryIO | io.BufferedReader, num_bytes: int) -> bytes:
    prefix = file.read(_LENGTH.size)
    if len(prefix) < _LENGTH.size:
        raise _DamageError(f"is truncated: {num_bytes} bytes are not even a header length")
    (length,) = _LENGTH.unpack(prefix)
    if length > num_bytes - _LENGTH.size:
        raise _DamageError(
            f"is truncated: its header claims {length} bytes, the file has {num_bytes}"
        )
    if length > MAX_HEADER_BYTES:
        raise _DamageError(f"has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
    header = b""
    while len(header) < length:
        piece = file.read(length - len(header))
        if not piece:
            raise _DamageError("became shorter while it was read")
        header += piece
    return header


def _entries(header: bytes, file_index: int, num_bytes: int) -> list[TensorEntry]:
    """The tensors of one file, in the order of their bytes."""
    start = _LENGTH.size + len(header)
    tensors = [
        _entry(name, value, file_index, start)
        for name, value in _parse(header).items()
        if name != "__metadata__"
    ]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    expected = start
    for tensor in tensors:
        if tensor.end > num_bytes:
            raise _DamageError(
                f"is truncated or damaged: tensor {shown(tensor.name)} ends at byte "
                f"{tensor.end}, the file at {num_bytes}"
            )
        if tensor.begin != expected:
            what = "overlaps another" if tensor.begin < expected else "leaves a gap before it"
            raise _DamageError(f"has a bad header: tensor {shown(tensor.name)} {what}")
        expected = tensor.end
    if expected != num_bytes:
        raise _DamageError(f"has {num_bytes - expected} bytes after its last tensor")
    return tensors


def _parse(header: bytes) -> dict[str, Any]:
    try:
        value = json.loads(header.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except UnicodeDecodeError:
        raise _DamageError("has a header that is not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _DamageError(f"has a header that is not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise _DamageError("has a header that is not a JSON object")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
        raise _DamageError(f"has a header that names {shown(twice)} twice")
    return value


def _entry(name: str, value: Any, file_index: int, start: int) -> TensorEntry:
    """Offsets in the header count from the data area, those in the entry from the file's start."""
    try:
        name.encode()  # JSON can spell half a surrogate pair, which is no text
        header = msgspec.convert(value, _Header)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise _DamageError(f"has a bad header: tensor {shown(name)}: {one_line(error)}") from None
    bits = DTYPE_BITS.get(header.dtype)
    if bits is None:
        raise _DamageError(
            f"has a bad header: tensor {shown(name)} has the unknown type {shown(header.dtype)}"
        )
    begin, end = header.data_offsets
    if math.prod(header.shape) * bits != (end - begin) * 8:
        raise _DamageError(
            f"has a bad header: tensor {shown(name)} of {header.dtype} {shown(header.shape)} "
            f"cannot take bytes {begin} to {end}"
        )
    return TensorEntry(name, header.dtype, header.shape, file_index, start + begin, start + end)
