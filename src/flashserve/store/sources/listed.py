"""The files of a remote checkpoint, read through their source: headers by range, no more."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.files import MAX_FILES, MAX_SMALL_BYTES, is_plain, is_small, shown
from flashserve.store.checkpoint.listing import FileReader, Listing, Source, SourceFile
from flashserve.store.checkpoint.naming import find_weights, small_names

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_BUFFER_BYTES = 64 << 10
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl")


class ListedFiles:
    """The files of a listing. `directory` is where the small ones will be on this machine."""

    def __init__(self, source: Source, listing: Listing, directory: Path) -> None:
        self.directory = directory
        self.place = listing.uri.rstrip("/")
        self._source = source
        self._files = {file.name: file for file in listing.files}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    def open(self, name: str) -> tuple[io.BufferedReader, int]:
        file = self._files.get(name)
        if file is None:
            raise FileNotFoundError(name)
        raw = _RemoteFile(self._source.open(file), file.num_bytes)
        return io.BufferedReader(raw, _BUFFER_BYTES), file.num_bytes


def select(source: Source, uri: str, found: Iterable[SourceFile]) -> tuple[SourceFile, ...]:
    """Those of the files at a remote place that belong to the checkpoint, sorted by name.

    Raises:
        SourceError: there are too many, or one has a name that is none of a file.
        CheckpointError: the weights are missing, or not to be loaded, or a file is too large.
    """
    files = {file.name: file for file in found if _matters(file.name)}
    for name in files:
        if not is_plain(name):
            raise SourceError(f"{uri} holds {shown(name)}, which is no name for a file")
    if len(files) > MAX_FILES:
        raise SourceError(f"{uri} holds {len(files)} files; a checkpoint has at most {MAX_FILES}")
    everything = Listing(uri, "", tuple(files.values()))
    names = set(find_weights(ListedFiles(source, everything, Path())).names)
    if missing := sorted(names - files.keys()):
        raise CheckpointError(f"{uri}/{missing[0]} is missing")
    for name in small_names(files):
        if files[name].num_bytes > MAX_SMALL_BYTES:
            raise CheckpointError(
                f"{uri}/{name} has {files[name].num_bytes} bytes; besides weights, at most "
                f"{MAX_SMALL_BYTES} are fetched"
            )
        names.add(name)
    return tuple(files[name] for name in sorted(names))


def _matters(name: str) -> bool:
    is_wanted = is_small(name) or name.endswith(_WEIGHT_SUFFIXES)
    return is_wanted and not name.startswith(".")


class _RemoteFile(io.RawIOBase):
    """One file from its start to its end; closes the reader with itself."""

    def __init__(self, reader: FileReader, num_bytes: int) -> None:
        super().__init__()
        self._reader = reader
        self._num_bytes = num_bytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        with memoryview(target).cast("B") as whole:
            count = min(len(whole), self._num_bytes - self._position)
            with whole[:count] as wanted:
                self._reader.read(self._position, wanted)
        self._position += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._reader.close()
        super().close()
