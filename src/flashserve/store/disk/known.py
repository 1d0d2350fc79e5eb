"""Chunk checksums of files that lie elsewhere, so that a second read of them can be compared."""

from __future__ import annotations

import threading

import msgspec
import structlog
import xxhash

from flashserve.store.disk.folder import Folder
from flashserve.store.disk.manifest import key_of

MAX_ENTRIES = 4096
_MAX_ENTRY_BYTES = 16 << 20
_CHECK_BYTES = 8

_log = structlog.get_logger()


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identity: str
    checksums: tuple[int, ...]


class KnownChecksums:
    """A bounded directory with a file per identity. Losing an entry costs a comparison only, so a
    disk that is full or fails is logged and otherwise ignored.
    """

    def __init__(self, folder: Folder, max_entries: int = MAX_ENTRIES) -> None:
        """Borrows `folder`. What is not an entry by its name is removed.

        Raises:
            OSError: the directory cannot be read.
        """
        self._folder = folder
        self._max_entries = max_entries
        self._lock = threading.Lock()
        # Oldest first.
        self._keys: dict[str, None] = {}
        ages = []
        for name in folder.names():
            facts = folder.facts(name)
            if facts is None or not _is_key(name):
                folder.remove_any(name)
            else:
                ages.append((facts.st_mtime_ns, name))
        self._keys = dict.fromkeys(name for _, name in sorted(ages))

    def remember(self, identity: str, checksums: tuple[int, ...]) -> None:
        """Notes the checksums of a file; the oldest entry goes when there are too many."""
        if self.recall(identity) == checksums:
            return
        key = key_of(identity)
        body = msgspec.msgpack.encode(_Entry(identity, checksums))
        with self._lock:
            try:
                self._folder.write(key, _check(body) + body, sync=False)
                self._keys.pop(key, None)
                self._keys[key] = None
                while len(self._keys) > self._max_entries:
                    self._remove(next(iter(self._keys)))
            except OSError as error:
                _log.warning("checksums were not kept", directory=self._folder.path, error=error)

    def recall(self, identity: str) -> tuple[int, ...] | None:
        """The checksums of that very file; a damaged entry is removed and counts as none."""
        key = key_of(identity)
        with self._lock:
            if key not in self._keys:
                return None
            try:
                entry = self._read(key)
                if entry is not None and entry.identity == identity:
                    return entry.checksums
                self._remove(key)
            except OSError as error:
                _log.warning("checksums were not read", directory=self._folder.path, error=error)
            return None

    def remove_damaged(self) -> int:
        """Reads every entry, and removes those that are damaged; how many that were.

        Raises:
            OSError: the disk fails.
        """
        with self._lock:
            damaged = [key for key in self._keys if not self._is_good(key)]
            for key in damaged:
                self._remove(key)
        return len(damaged)

    def _is_good(self, key: str) -> bool:
        entry = self._read(key)
        return entry is not None and key_of(entry.identity) == key

    def _read(self, key: str) -> _Entry | None:
        data = self._folder.read(key, _MAX_ENTRY_BYTES)
        check, body = data[:_CHECK_BYTES], data[_CHECK_BYTES:]
        if check != _check(body):
            return None
        try:
            return msgspec.msgpack.decode(body, type=_Entry)
        except (msgspec.MsgspecError, ValueError):
            return None

    def _remove(self, key: str) -> None:
        del self._keys[key]
        self._folder.remove_any(key)


def _is_key(name: str) -> bool:
    return len(name) == 32 and set(name) <= set("0123456789abcdef")


def _check(body: bytes) -> bytes:
    return xxhash.xxh3_64_digest(body)
