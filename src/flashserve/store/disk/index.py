"""What lies below the disk tier's root, as one process that owns it knows it.

checkpoints/KEY   whole checkpoints, with their manifests
blobs/BLAKE3      further hard links to their files, by content
incoming/KEY      fetches under way, and what interrupted ones left
quarantine/KEY    damaged checkpoints: never served, first to go
known/KEY         checksums of files that lie elsewhere
trash/            on its way to nothing

Not thread-safe: `disktier.DiskTier` holds its lock around everything but `empty_trash`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

from flashserve.errors import CheckpointError, ConflictError
from flashserve.store.disk.contents import (
    check_files,
    has_chunks,
    is_own,
    relocated,
    remove_strangers,
    settle,
)
from flashserve.store.disk.folder import Folder, is_temporary
from flashserve.store.disk.manifest import MANIFEST, Stored, read_manifest

CHECKPOINTS = "checkpoints"
INCOMING = "incoming"
QUARANTINE = "quarantine"
BLOBS = "blobs"
KNOWN = "known"
_TRASH = "trash"
_AREAS = (CHECKPOINTS, INCOMING, QUARANTINE, BLOBS, KNOWN, _TRASH)
_KEY = re.compile(r"[0-9a-f]{32}")
_BLOCK_BYTES = 512


@dataclasses.dataclass(slots=True, eq=False)
class Entry:
    """Something that takes space. `inodes` are bytes by inode; last_used is in seconds of the
    epoch. `stored` is there exactly for whole checkpoints.
    """

    area: str
    key: str
    inodes: dict[int, int]
    last_used: float
    stored: Stored | None = None


class DiskIndex:
    """The entries of the tier by area and key; entered at start, and kept true after that."""

    def __init__(self, root: Path) -> None:
        """Takes the root, puts right what a dead process left half-done, and looks at the rest.

        Raises:
            ConflictError: another process owns the root; names it.
            InputError: the root is a link, or another user's.
            OSError: the disk fails.
        """
        self.problems: list[str] = []
        self.removed: list[str] = []
        self.entries: dict[tuple[str, str], Entry] = {}
        self._folders: dict[str, Folder] = {}
        self._root = Folder.make_root(root)
        self._lock_fd = -1
        self._trash_lock = threading.Lock()
        try:
            self._lock_fd = _lock(self._root)
            for area in _AREAS:
                self._folders[area] = self._root.child(area, make=True)
            for name in self._root.names():
                if is_temporary(name):
                    self._root.remove_any(name)
            self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for folder in (*self._folders.values(), self._root):
            folder.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def folder(self, area: str) -> Folder:
        return self._folders[area]

    def open(self, area: str, key: str, *, make: bool = False) -> Folder:
        return self._folders[area].child(key, make=make)

    def checkpoint(self, key: str) -> Entry | None:
        return self.entries.get((CHECKPOINTS, key))

    def checkpoints(self) -> list[tuple[Entry, Stored]]:
        return [(entry, entry.stored) for entry in self.entries.values() if entry.stored]

    def publish(self, key: str, stored: Stored, last_used: float) -> Stored:
        """Moves a settled checkpoint from incoming to where it is found."""
        source, target = self._folders[INCOMING], self._folders[CHECKPOINTS]
        stored = relocated(stored, target.path / key)
        with source.child(key) as folder:
            inodes = check_files(folder, stored)
            folder.touch(MANIFEST, last_used)
        self._clear(CHECKPOINTS, key)
        source.rename(key, target, key)
        target.sync()
        source.sync()
        self.entries[CHECKPOINTS, key] = Entry(CHECKPOINTS, key, inodes, last_used, stored)
        return stored

    def enter_leftover(self, area: str, key: str, last_used: float) -> None:
        """Counts a directory that holds no whole checkpoint."""
        with self.open(area, key) as folder:
            inodes = {}
            for name in folder.names():
                facts = folder.facts(name)
                if facts is not None and stat.S_ISREG(facts.st_mode) and not is_own(name):
                    # A part has its final length from the start, and holes where bytes will be.
                    inodes[facts.st_ino] = min(facts.st_size, facts.st_blocks * _BLOCK_BYTES)
        self.entries[area, key] = Entry(area, key, inodes, last_used)

    def restore(self, entry: Entry, stored: Stored) -> None:
        """Moves a checkpoint that was put aside, and is good again, back to where it is found."""
        target = self._folders[CHECKPOINTS]
        self._folders[entry.area].rename(entry.key, target, entry.key)
        target.sync()
        del self.entries[entry.area, entry.key]
        with target.child(entry.key) as folder:
            inodes = check_files(folder, stored)
        stored = relocated(stored, target.path / entry.key)
        restored = Entry(CHECKPOINTS, entry.key, inodes, entry.last_used, stored)
        self.entries[CHECKPOINTS, entry.key] = restored

    def quarantined(self) -> Iterator[tuple[Entry, Stored | None]]:
        """What was put aside; None where there is no manifest to put it right by."""
        for entry in [each for each in self.entries.values() if each.area == QUARANTINE]:
            with self.open(QUARANTINE, entry.key) as folder:
                try:
                    yield entry, read_manifest(folder, folder.path, entry.key)
                except CheckpointError:
                    yield entry, None

    def empty_leftovers(self) -> list[Entry]:
        """Places of interrupted fetches in which nothing is worth resuming."""
        found = []
        for entry in [each for each in self.entries.values() if each.area == INCOMING]:
            with self.open(INCOMING, entry.key) as folder:
                if not has_chunks(folder):
                    found.append(entry)
        return found

    def quarantine(self, entry: Entry) -> None:
        """Moves a damaged checkpoint out of sight."""
        self._clear(QUARANTINE, entry.key)
        del self.entries[entry.area, entry.key]
        target = self._folders[QUARANTINE]
        self._folders[entry.area].rename(entry.key, target, entry.key)
        self.enter_leftover(QUARANTINE, entry.key, 0.0)

    def discard(self, entry: Entry) -> None:
        """Takes an entry out of sight; `empty_trash` then frees its space."""
        del self.entries[entry.area, entry.key]
        self._to_trash(entry.area, entry.key)

    def empty_trash(self) -> None:
        """Safe from any thread: it takes its time, so nobody else need wait for it."""
        trash = self._folders[_TRASH]
        with self._trash_lock:
            for name in trash.names():
                trash.remove_any(name)

    def refresh(self, entry: Entry, stored: Stored) -> None:
        """After a file of a checkpoint was replaced by an equal one."""
        with self.open(entry.area, entry.key) as folder:
            entry.inodes = check_files(folder, stored)
        entry.stored = stored

    def remove_strangers(self) -> list[str]:
        """Files in the directories of whole checkpoints that their manifests do not name."""
        strangers = []
        for entry, stored in self.checkpoints():
            with self.open(CHECKPOINTS, entry.key) as folder:
                names = remove_strangers(folder, stored)
            strangers += [str(stored.directory / name) for name in names]
        return strangers

    def _recover(self) -> None:
        self.empty_trash()
        for area in (CHECKPOINTS, INCOMING, QUARANTINE):
            for name in self._folders[area].names():
                facts = self._folders[area].facts(name)
                if facts is None or not (_KEY.fullmatch(name) and stat.S_ISDIR(facts.st_mode)):
                    self._folders[area].remove_any(name)
                    self.removed.append(str(self._folders[area].path / name))
                elif area == CHECKPOINTS:
                    self._enter_checkpoint(name)
                else:
                    self.enter_leftover(area, name, facts.st_mtime)
        for area, key in [place for place in self.entries if place[0] == INCOMING]:
            self._recover_incoming(self.entries[area, key])

    def _enter_checkpoint(self, key: str) -> None:
        directory = self._folders[CHECKPOINTS].path / key
        with self.open(CHECKPOINTS, key) as folder:
            try:
                stored = read_manifest(folder, directory, key)
                inodes = check_files(folder, stored)
            except CheckpointError as error:
                self.problems.append(error.message)
            else:
                facts = folder.facts(MANIFEST)
                last_used = facts.st_mtime if facts else 0.0
                remove_strangers(folder, stored)
                self.entries[CHECKPOINTS, key] = Entry(CHECKPOINTS, key, inodes, last_used, stored)
                return
        self.enter_leftover(CHECKPOINTS, key, 0.0)
        self.quarantine(self.entries[CHECKPOINTS, key])

    def _recover_incoming(self, entry: Entry) -> None:
        """A manifest says that every byte was safe when the process died: the rest is renaming."""
        with self.open(INCOMING, entry.key) as folder:
            for name in folder.names():
                if is_temporary(name):
                    folder.remove_any(name)
            if folder.facts(MANIFEST) is None:
                return
            try:
                stored = read_manifest(folder, folder.path, entry.key)
                settle(folder, stored)
            except CheckpointError as error:
                self.problems.append(error.message)
                folder.remove_any(MANIFEST)
                return
        del self.entries[INCOMING, entry.key]
        self.publish(entry.key, stored, entry.last_used)

    def _clear(self, area: str, key: str) -> None:
        """Makes sure that nothing is in a place that something is to be moved to."""
        self.entries.pop((area, key), None)
        if self._folders[area].facts(key) is not None:
            self._to_trash(area, key)

    def _to_trash(self, area: str, key: str) -> None:
        self._folders[area].rename(key, self._folders[_TRASH], f"{key}-{secrets.token_hex(8)}")


def _lock(root: Folder) -> int:
    """The descriptor that holds the lock. The file stays: removing it would race."""
    fd = root.open("lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise ConflictError(
            f"another process ({owner}) has the checkpoints in {root.path} open; stop it first"
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd
