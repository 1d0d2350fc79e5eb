"""Brings single chunks of a stored checkpoint again, from the source that it came from."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from flashserve.config import StoreSettings
from flashserve.errors import InternalError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, FileReader, Source, SourceFile
from flashserve.store.disk.chunks import chunk_bytes
from flashserve.store.disk.manifest import Stored
from flashserve.store.sources.source import open_source


class Refetcher:
    """A `fsck.Refetch`. A context manager: readers are kept between the chunks of a file."""

    def __init__(
        self,
        data_dir: Path,
        settings: StoreSettings,
        open_uri: Callable[[str, Path, StoreSettings], Source] = open_source,
    ) -> None:
        self._data_dir = data_dir
        self._settings = settings
        self._open_uri = open_uri
        self._readers: dict[tuple[str, SourceFile], FileReader] = {}

    def __call__(self, stored: Stored, name: str, index: int) -> bytes:
        """The bytes of chunk `index` as they are at the source now.

        Raises:
            SourceError, CheckpointError, UnavailableError: it cannot be had, or has changed.
        """
        file = next((each for each in stored.listing.files if each.name == name), None)
        if file is None:
            raise InternalError(f"{name} is not in {stored.listing.uri}")
        reader = self._reader(stored.listing.uri, file)
        # Anonymous memory is page-aligned, and whole pages long, as readers want it.
        with mmap.mmap(-1, chunk_bytes(file, index)) as memory:
            with memoryview(memory) as target:
                reader.read(index * CHUNK_BYTES, target)
            return memory[:]

    def __enter__(self) -> Refetcher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as stack:
            for reader in self._readers.values():
                stack.callback(reader.close)
        self._readers.clear()

    def _reader(self, uri: str, file: SourceFile) -> FileReader:
        if (uri, file) not in self._readers:
            source = self._open_uri(uri, self._data_dir, self._settings)
            self._readers[uri, file] = source.open(file)
        return self._readers[uri, file]
