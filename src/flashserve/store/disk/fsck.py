"""Checks every byte of the disk tier, puts right what can be, and puts aside what cannot."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flashserve.errors import ConflictError, FlashServeError
from flashserve.store.checkpoint.listing import SourceFile
from flashserve.store.disk import blobs
from flashserve.store.disk.checking import Findings, check_file, rewrite
from flashserve.store.disk.folder import disk_errors
from flashserve.store.disk.index import INCOMING, QUARANTINE, DiskIndex, Entry
from flashserve.store.disk.manifest import Stored, key_of
from flashserve.store.disk.tier import DiskTier

_NUM_THREADS = 4

Refetch = Callable[[Stored, str, int], bytes]
"""The bytes of a chunk (by index) of a file of a checkpoint, from where it came from; any
FlashServeError says why not."""

Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all; by one thread at a time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Problem:
    """One damaged file. ranges are [begin, end) in bytes; what is wrong, and why it stays so.

    uri is empty, and there are no ranges, where nobody can tell whose file it was.
    """

    path: Path
    uri: str
    ranges: tuple[tuple[int, int], ...]
    what: str
    is_repaired: bool


@dataclasses.dataclass(frozen=True, slots=True)
class FsckReport:
    """num_files and num_bytes count what was read, shared files once. set_aside are the sources of
    the checkpoints that are not served any more; resumable ones are interrupted fetches.
    """

    num_checkpoints: int
    num_files: int
    num_bytes: int
    problems: tuple[Problem, ...]
    removed: tuple[str, ...]
    set_aside: tuple[str, ...]
    num_resumable: int
    resumable_bytes: int

    @property
    def is_clean(self) -> bool:
        """Is everything that is there whole now?"""
        return all(problem.is_repaired for problem in self.problems)


def fsck(
    tier: DiskTier, refetch: Refetch | None = None, progress: Progress | None = None
) -> FsckReport:
    """Verifies all checkpoints, also those put aside earlier, which come back if they are whole.

    A damaged file is written anew with what `refetch` brings for its damaged chunks; without it, or
    where that fails, its checkpoints are put aside. Orphans are removed. Nobody may use the tier
    meanwhile.

    Raises:
        UnavailableError: the disk is full or fails.
    """
    problems = [Problem(tier.root, "", (), what, is_repaired=False) for what in tier.problems]
    with tier.exclusive() as index:
        removed = _remove_orphans(tier, index)
        work = _Work(index, progress)
        work.check()
        problems += [_mend(index, group, refetch) for group in work.damaged]
        set_aside = _put_in_place(index, work.subjects)
        left = [entry for entry in index.entries.values() if entry.area == INCOMING]
        report = FsckReport(
            num_checkpoints=len(work.subjects),
            num_files=len(work.groups),
            num_bytes=work.num_bytes,
            problems=tuple(problems),
            removed=tuple(removed + blobs.remove_strays(index)),
            set_aside=tuple(set_aside),
            num_resumable=len(left),
            resumable_bytes=sum(sum(entry.inodes.values()) for entry in left),
        )
        index.empty_trash()
    return report


def repair_file(
    tier: DiskTier,
    identity: str,
    name: str,
    damaged: Collection[int],
    refetch: Callable[[int], bytes],
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Writes one file of a checkpoint anew, while the tier is in use; `refetch` brings the damaged
    chunks by index. advance is told the bytes of each chunk; what it raises ends this.

    Raises:
        CheckpointError: what was refetched, or the rest of the file, is not what it should be.
        ConflictError: the checkpoint is no longer on disk.
        UnavailableError: the disk is full or fails.
    """
    tier.pin(identity)
    try:
        with tier.exclusive() as index:
            entry, stored = _whole(index, identity)
            folder = index.open(entry.area, entry.key)
            file = next(file for file in stored.listing.files if file.name == name)
        with folder, disk_errors(tier.root):
            fresh = rewrite(folder, stored, file, damaged, refetch, advance)
        with tier.exclusive() as index:
            entry, stored = _whole(index, identity)
            blobs.replace(index, entry, stored, name, fresh)
    finally:
        tier.unpin(identity)


def _whole(index: DiskIndex, identity: str) -> tuple[Entry, Stored]:
    entry = index.checkpoint(key_of(identity))
    if entry is None or entry.stored is None:
        raise ConflictError("the checkpoint is no longer on disk")
    return entry, entry.stored


@dataclasses.dataclass(slots=True, eq=False)
class _Subject:
    """A checkpoint under examination, wherever it lies."""

    entry: Entry
    stored: Stored
    is_good: bool = True


@dataclasses.dataclass(slots=True, eq=False)
class _Group:
    """Names of one file on disk; findings are those of reading it once."""

    names: list[tuple[_Subject, SourceFile]]
    findings: Findings | None = None


class _Work:
    """What there is to read, and what reading it found."""

    def __init__(self, index: DiskIndex, progress: Progress | None) -> None:
        self.subjects = [_Subject(entry, stored) for entry, stored in index.checkpoints()]
        self.subjects += [
            _Subject(entry, stored)
            for entry, stored in index.quarantined()
            if stored is not None and index.checkpoint(entry.key) is None
        ]
        self._index = index
        self._progress = progress
        self._lock = threading.Lock()
        self._num_done = 0
        groups: dict[tuple[object, ...], _Group] = {}
        for subject in self.subjects:
            with index.open(subject.entry.area, subject.entry.key) as folder:
                for file in subject.stored.listing.files:
                    facts = folder.facts(file.name)
                    place = facts.st_ino if facts else (subject.entry.key, file.name)
                    promise = subject.stored.digests.get(file.name)
                    same = (place, subject.stored.checksums[file.name], promise)
                    groups.setdefault(same, _Group([])).names.append((subject, file))
        self.groups = list(groups.values())
        self.num_bytes = sum(group.names[0][1].num_bytes for group in self.groups)

    @property
    def damaged(self) -> list[_Group]:
        return [group for group in self.groups if group.findings and group.findings.is_damaged]

    def check(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "fsck") as pool:
            for _ in pool.map(self._check_group, self.groups):
                pass

    def _check_group(self, group: _Group) -> None:
        subject, file = group.names[0]
        with self._index.open(subject.entry.area, subject.entry.key) as folder:
            group.findings = check_file(folder, subject.stored, file, self._advance)

    def _advance(self, num_bytes: int) -> None:
        with self._lock:
            self._num_done += num_bytes
            if self._progress:
                self._progress(self._num_done, self.num_bytes)


def _remove_orphans(tier: DiskTier, index: DiskIndex) -> list[str]:
    """What a crash or another hand left and nothing refers to; what it was."""
    removed = [*index.removed, *index.remove_strangers()]
    useless = [entry for entry, stored in index.quarantined() if stored is None]
    for entry in [*index.empty_leftovers(), *useless]:
        index.discard(entry)
        removed.append(str(index.folder(entry.area).path / entry.key))
    if num_damaged := tier.known.remove_damaged():
        removed.append(f"{num_damaged} damaged entries of known checksums")
    return removed


def _mend(index: DiskIndex, group: _Group, refetch: Refetch | None) -> Problem:
    subject, file = group.names[0]
    findings = group.findings
    assert findings is not None
    why = "there is nothing to repair it from" if refetch is None else ""
    if refetch is not None:
        try:
            fresh = _rewrite(index, subject, file, findings, refetch)
            blobs.replace(index, subject.entry, subject.stored, file.name, fresh)
        except FlashServeError as error:
            why = error.message
    if why:
        for holder, _ in group.names:
            holder.is_good = False
    what = f"{findings.what}; {why}" if why else findings.what
    path = index.folder(subject.entry.area).path / subject.entry.key / file.name
    return Problem(path, subject.stored.listing.uri, findings.ranges(file), what, not why)


def _rewrite(
    index: DiskIndex, subject: _Subject, file: SourceFile, findings: Findings, refetch: Refetch
) -> str:
    with index.open(subject.entry.area, subject.entry.key) as folder, disk_errors(folder.path):
        return rewrite(
            folder,
            subject.stored,
            file,
            findings.chunks,
            lambda chunk: refetch(subject.stored, file.name, chunk),
        )


def _put_in_place(index: DiskIndex, subjects: Iterable[_Subject]) -> list[str]:
    """Puts the bad ones aside and the good ones back; the sources of the bad ones."""
    set_aside = []
    for subject in subjects:
        is_aside = subject.entry.area == QUARANTINE
        if not subject.is_good:
            set_aside.append(subject.stored.listing.uri)
            if not is_aside:
                index.quarantine(subject.entry)
        elif is_aside:
            index.restore(subject.entry, subject.stored)
    return set_aside
