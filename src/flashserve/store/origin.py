"""Everything below DRAM: sources, the disk tier between, and how a checkpoint comes out of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, ConflictError, SourceError
from flashserve.store.checkpoint.files import CheckpointFiles, DirectoryFiles, is_small
from flashserve.store.checkpoint.listing import FileReader, Listing, Source, SourceFile
from flashserve.store.checkpoint.snapshot import Snapshot, read_snapshot
from flashserve.store.disk.incoming import Incoming
from flashserve.store.disk.manifest import Stored
from flashserve.store.disk.tier import DiskTier
from flashserve.store.nearby import Resumed, StoredFiles
from flashserve.store.pipeline import FileLoad, load
from flashserve.store.smallfiles import SmallFiles
from flashserve.store.sources.listed import ListedFiles
from flashserve.store.sources.local import DirectorySource
from flashserve.store.sources.rate import RateLimit
from flashserve.store.sources.reading import LocalReader
from flashserve.store.sources.source import open_source
from flashserve.store.transfers import Transfer
from flashserve.types import Tier

_log = logging.getLogger(__name__)

OnChunk = Callable[[int, memoryview, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """One version of a checkpoint, and the nearest place that has it.

    stored: its copy in the disk tier, None where there is none, or none is needed.
    """

    source: Source
    listing: Listing
    stored: Stored | None

    @property
    def is_remote(self) -> bool:
        return self.source.lowest_tier is Tier.REMOTE

    @property
    def is_fetched(self) -> bool:
        """Whether its bytes come from far away, and not from an earlier copy on disk."""
        return self.is_remote and self.stored is None

    def file(self, name: str) -> SourceFile:
        for file in self.listing.files:
            if file.name == name:
                return file
        raise CheckpointError(f"{self.listing.uri}/{name} is missing")


class Origins:
    """Finds checkpoints, and opens their files for the pipeline. Thread-safe."""

    def __init__(self, data_dir: Path, settings: StoreSettings) -> None:
        self._data_dir = data_dir
        self._settings = settings
        self._small = SmallFiles(data_dir)
        self._disk_limit = RateLimit(settings.disk_bytes_per_s)
        self.disk = _open_disk(data_dir / "store", settings)

    def close(self) -> None:
        if self.disk is not None:
            self.disk.close()

    def look(self, uri: str) -> Origin:
        """Asks the source what it holds now; where it cannot be reached, what is on disk of it
        will do.

        Raises:
            SourceError, CheckpointError: it cannot be had.
        """
        source = self._open_source(uri)
        try:
            listing = source.listing()
        except SourceError as error:
            if stored := self.on_disk(uri):
                _log.warning("%s: serving the copy on disk: %s", uri, error.message)
                return Origin(source, stored.listing, stored)
            raise
        # Only now is it known whether a hub's cache on this machine has it.
        is_here = source.lowest_tier is not Tier.REMOTE
        find = self.disk.find if self.disk and not is_here else None
        return Origin(source, listing, find(listing.identity) if find else None)

    def ask(self, uri: str) -> tuple[Source, Listing]:
        """What the source itself holds now, whatever is on disk of it.

        Raises:
            SourceError, CheckpointError: it cannot be had.
        """
        source = self._open_source(uri)
        return source, source.listing()

    def is_far(self, uri: str) -> bool:
        """Whether it takes the network to look at a source."""
        return self._open_source(uri).lowest_tier is Tier.REMOTE

    def on_disk(self, uri: str) -> Stored | None:
        """The newest whole copy of a remote source in the disk tier."""
        if self.disk is None:
            return None
        found = [each for each in self.disk.checkpoints() if each.listing.uri == uri]
        return found[-1] if found else None

    def version(self, uri: str, identity: str) -> Origin:
        """What `look` finds, if it is the version `identity`; without asking where that is on disk.

        Raises:
            SourceError: it cannot be had.
            CheckpointError: the source holds another version by now.
        """
        if self.disk is not None and (stored := self.disk.find(identity)):
            return Origin(self._open_source(uri), stored.listing, stored)
        origin = self.look(uri)
        if origin.listing.identity != identity:
            raise CheckpointError(f"{uri} has changed since it was added: add it again")
        return origin

    def files(self, origin: Origin) -> CheckpointFiles:
        """The files of a checkpoint, with a directory for the small ones. Moves no weights."""
        if isinstance(origin.source, DirectorySource):
            return DirectoryFiles(origin.source.directory())
        listed = ListedFiles(origin.source, origin.listing, self._small_files(origin))
        if origin.stored is None:
            return listed
        read_chunk = functools.partial(self.chunk, origin)
        return StoredFiles(origin.stored, listed.directory, read_chunk)

    def snapshot(self, origin: Origin) -> Snapshot:
        """Config and layout of a model, and a directory with the small files. Moves no weights."""
        files = self.files(origin)
        return read_snapshot(files, origin.listing.uri, origin.listing.identity)

    def chunk(self, origin: Origin, file: SourceFile, index: int) -> bytes:
        """One chunk of a file, from the nearest place, and right, as far as that is known."""
        found: list[bytes] = []
        with contextlib.ExitStack() as readers:
            loaded = self.file_load(
                origin, file, None, lambda _, data, __: found.append(bytes(data)), readers
            )
            load([loaded], [(0, index)], num_threads=1, stopping=threading.Event())
        return found[0]

    def known(self, file: SourceFile) -> dict[int, int]:
        """Checksums that an earlier read of a local file took."""
        checksums = self.disk.recall(file.identity) if self.disk else None
        return dict(enumerate(checksums or ()))

    def remember(self, file: SourceFile, checksums: tuple[int, ...]) -> None:
        if self.disk is not None:
            self.disk.remember(file.identity, checksums)

    def distrust(self, origin: Origin, reason: str) -> None:
        """What came of it is not what its origin promised: no copy on disk is served."""
        if self.disk is not None:
            self.disk.quarantine(origin.listing.identity, reason)

    def set_digest(self, origin: Origin, name: str, digest: str) -> None:
        """The BLAKE3 of a file of a remote checkpoint, for its copy on disk if there is one."""
        if self.disk is not None and origin.is_remote:
            self.disk.set_digest(origin.listing.identity, name, digest)

    @contextlib.contextmanager
    def pinned(self, origin: Origin) -> Iterator[None]:
        """Keeps the copy on disk while it is read."""
        if origin.stored is None or self.disk is None:
            yield
            return
        self.disk.pin(origin.listing.identity)
        try:
            yield
        finally:
            self.disk.unpin(origin.listing.identity)

    def begin(self, origin: Origin) -> Incoming | None:
        """A place on disk for a remote checkpoint, with its small files in it; None where it is
        there, being written, or not wanted.

        Raises:
            UnavailableError: the disk tier has no room.
        """
        if self.disk is None or not origin.is_remote or origin.stored is not None:
            return None
        with contextlib.suppress(ConflictError):
            incoming = self.disk.begin(origin.listing)
            try:
                directory = self._small_files(origin)
                for file in filter(lambda each: is_small(each.name), origin.listing.files):
                    incoming.put(file.name, (directory / file.name).read_bytes())
            except BaseException:
                incoming.close()
                raise
            return incoming
        return None

    def file_load(
        self,
        origin: Origin,
        file: SourceFile,
        memory: memoryview | None,
        on_chunk: OnChunk,
        readers: contextlib.ExitStack,
        *,
        resumed: tuple[Incoming, dict[int, int]] | None = None,
        on_damage: Callable[[int], None] = lambda _: None,
    ) -> FileLoad:
        """How one file is read from the nearest place; its readers close with `readers`.

        Args:
            resumed: what an interrupted fetch left, and the checksums of the file's chunks in it by
                index; one that turns out to be damaged there is taken out.
            on_damage: told the index of a chunk that is damaged in the disk tier, once it has been
                fetched again.
        """
        path, again = f"{origin.listing.uri.rstrip('/')}/{file.name}", None
        reader: FileReader
        if origin.stored is not None:
            directory, known = origin.stored.directory, origin.stored.checksums[file.name]
            reader = LocalReader(directory, file, self._settings)
            path, again = str(directory / file.name), lambda: origin.source.open(file)
            loaded = FileLoad(
                path,
                file.num_bytes,
                reader,
                memory,
                on_chunk,
                dict(enumerate(known)),
                again,
                self._disk_limit.take,
                on_damage,
            )
        elif not origin.is_remote:
            reader = origin.source.open(file)
            loaded = FileLoad(
                path,
                file.num_bytes,
                reader,
                memory,
                on_chunk,
                self.known(file),
                None,
                self._disk_limit.take,
            )
        else:
            reader = origin.source.open(file)
            if resumed and resumed[1]:
                reader = Resumed(reader, resumed[0], file, resumed[1])
            loaded = FileLoad(path, file.num_bytes, reader, memory, on_chunk)
        readers.callback(reader.close)
        return loaded

    def fetch(
        self, origin: Origin, incoming: Incoming, stopping: threading.Event, transfer: Transfer
    ) -> None:
        """Brings what is missing of a remote checkpoint to disk, and to no other place.

        Args:
            transfer: told of every chunk that is there or comes.

        Raises:
            FlashServeError: it cannot be read or written; what is there can be resumed.
        """
        weights = [file for file in origin.listing.files if not is_small(file.name)]
        with contextlib.ExitStack() as readers:
            files, order = [], []
            for number, file in enumerate(weights):
                done = incoming.done(file.name)

                def write(
                    index: int, data: memoryview, checksum: int, name: str = file.name
                ) -> None:
                    incoming.write_chunk(name, index, data, checksum)
                    transfer.read(len(data))

                files.append(self.file_load(origin, file, None, write, readers))
                order += [(number, n) for n in range(file.num_chunks) if n not in done]
                transfer.found(sum(file.chunk_bytes(n) for n in done))
            num_threads = self._settings.remote_connections
            load(files, order, num_threads=num_threads, stopping=stopping)
        incoming.complete()

    def _open_source(self, uri: str) -> Source:
        return open_source(uri, self._data_dir, self._settings)

    def _small_files(self, origin: Origin) -> Path:
        """A directory with config, tokenizer and the like of a remote checkpoint."""
        return self._small.directory(
            origin.listing,
            lambda file: b"".join(
                self.chunk(origin, file, index) for index in range(file.num_chunks)
            ),
        )


def _open_disk(root: Path, settings: StoreSettings) -> DiskTier | None:
    """None where another process has it: this one then reads every source itself."""
    try:
        root.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return DiskTier(root, settings.disk_bytes)
    except ConflictError as error:
        _log.info("no disk tier: %s", error.message)
        return None
