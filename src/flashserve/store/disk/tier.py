"""The disk tier: checkpoints fetched from remote sources, verbatim, within a budget.

A checkpoint is visible when it is whole, and goes in one step; equal files of two checkpoints are
one file with several names. Everything here blocks and is thread-safe. `diskindex` says what lies
where.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from flashserve.errors import CheckpointError, ConflictError, InternalError, UnavailableError
from flashserve.store.checkpoint.listing import Listing
from flashserve.store.disk import blobs
from flashserve.store.disk.budget import DiskUsage, age, bytes_of, choose_victims
from flashserve.store.disk.contents import check_files
from flashserve.store.disk.folder import disk_errors
from flashserve.store.disk.incoming import Incoming
from flashserve.store.disk.index import (
    CHECKPOINTS,
    INCOMING,
    KNOWN,
    QUARANTINE,
    DiskIndex,
    Entry,
)
from flashserve.store.disk.known import KnownChecksums
from flashserve.store.disk.manifest import (
    DIGEST,
    MANIFEST,
    Stored,
    check_listing,
    key_of,
    listed_bytes,
    write_manifest,
)


class DiskTier:
    """One process owns a root at a time. Files of a `Stored` stay while it is pinned."""

    def __init__(
        self, root: Path, budget_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """Opens or makes the tier below `root`, which becomes private to this user.

        Raises:
            ConflictError: another process has it open.
            InputError: the root is a link, or another user's.
            UnavailableError: the disk fails.
        """
        self.root = root
        self._budget_bytes = budget_bytes
        self._clock = clock
        self.num_evicted = 0
        """Checkpoints that made room, or were asked to go."""
        self._lock = threading.RLock()
        self._held: dict[str, Incoming] = {}
        self._pins: collections.Counter[str] = collections.Counter()
        with disk_errors(root):
            self.index = DiskIndex(root)
            try:
                self.known = KnownChecksums(self.index.folder(KNOWN))
                self.index.removed += blobs.remove_strays(self.index)
            except BaseException:
                self.index.close()
                raise

    @property
    def problems(self) -> tuple[str, ...]:
        """What was found damaged, and put aside, since the tier was opened."""
        with self._lock:
            return tuple(self.index.problems)

    @property
    def num_pins(self) -> int:
        """How often checkpoints are kept from being evicted."""
        with self._lock:
            return self._pins.total()

    def close(self) -> None:
        """Fetches under way end, and can be resumed; the root is free for another process."""
        with self._lock:
            held = tuple(self._held.values())
        for incoming in held:
            incoming.close()
        self.index.close()

    def find(self, identity: str) -> Stored | None:
        """The whole checkpoint of that identity, which counts as used now."""
        with self._lock, disk_errors(self.root):
            return self._use(key_of(identity))

    def pin(self, identity: str) -> None:
        """Keeps a checkpoint from being evicted until as many calls of `unpin`; it need not be
        there yet.
        """
        with self._lock, disk_errors(self.root):
            self._pins[key_of(identity)] += 1
            self._use(key_of(identity))

    def unpin(self, identity: str) -> None:
        with self._lock:
            key = key_of(identity)
            if not self._pins[key]:
                raise InternalError("a checkpoint was unpinned more often than pinned")
            self._pins[key] -= 1

    def begin(self, listing: Listing) -> Incoming:
        """Makes a place for a checkpoint, or goes on with the one that an earlier fetch left. Files
        that a whole checkpoint has too are there already.

        Room is made by evicting what was used least recently and is not pinned.

        Raises:
            CheckpointError: a listed name is not plain.
            ConflictError: it is on disk already, or is being written.
            UnavailableError: it does not fit, now or ever; or the disk fails.
        """
        check_listing(listing)
        key = key_of(listing.identity)
        with disk_errors(self.root):
            with self._lock:
                if key in self._held or self.index.checkpoint(key):
                    state = "being written to disk" if key in self._held else "on disk already"
                    raise ConflictError(f"{listing.uri} is {state}")
                self._make_room(listing, key)
                incoming = self._held[key] = self._open_incoming(listing, key)
                self.index.entries.pop((INCOMING, key), None)
            self.index.empty_trash()
        return incoming

    def evict(self, identity: str) -> int:
        """Removes a checkpoint, or what an interrupted fetch of it left; how many bytes that freed.

        Raises:
            ConflictError: it is pinned, or being written.
        """
        key = key_of(identity)
        with disk_errors(self.root):
            with self._lock:
                if key in self._held or self._pins[key]:
                    raise ConflictError("the checkpoint on disk is in use")
                before = self._used()
                for area in (CHECKPOINTS, INCOMING, QUARANTINE):
                    if entry := self.index.entries.get((area, key)):
                        self.num_evicted += area == CHECKPOINTS
                        self._discard(entry)
                freed = before - self._used()
            self.index.empty_trash()
        return freed

    def quarantine(self, identity: str, reason: str) -> None:
        """Takes a damaged checkpoint out of sight; it is never served again.

        Where the disk takes no change, it is only forgotten: until the next start.
        """
        with self._lock:
            entry = self.index.checkpoint(key_of(identity))
            if entry is None:
                return
            try:
                with disk_errors(self.root):
                    self._quarantine(entry, reason)
            except UnavailableError:
                entry.stored = None

    def set_digest(self, identity: str, name: str, digest: str) -> None:
        """Notes the BLAKE3 of a file, and stores the file once with all that have it.

        A checkpoint that has gone meanwhile is ignored.
        """
        if not re.fullmatch(DIGEST, digest):
            raise InternalError(f"{digest!r} is not a BLAKE3 digest in hex")
        with self._lock, disk_errors(self.root):
            entry = self.index.checkpoint(key_of(identity))
            if entry is None or entry.stored is None or entry.stored.digests.get(name) == digest:
                return
            stored = dataclasses.replace(
                entry.stored, digests={**entry.stored.digests, name: digest}
            )
            blobs.share(self.index, entry, name, digest)
            with self.index.open(CHECKPOINTS, entry.key) as folder:
                write_manifest(folder, stored)
                folder.touch(MANIFEST, entry.last_used)
            self.index.refresh(entry, stored)

    def remember(self, identity: str, checksums: tuple[int, ...]) -> None:
        """Keeps the chunk checksums of a file that lies elsewhere; the oldest go in the end."""
        self.known.remember(identity, checksums)

    def recall(self, identity: str) -> tuple[int, ...] | None:
        """What `remember` was told of a file of that identity, if it is still there."""
        return self.known.recall(identity)

    def usage(self) -> DiskUsage:
        """Each file counts once, however many checkpoints share it; what is being written counts
        whole.
        """
        with self._lock:
            used = self._used()
        return DiskUsage(self._budget_bytes, used, max(0, self._budget_bytes - used))

    def checkpoints(self) -> list[Stored]:
        """All whole checkpoints, least recently used first."""
        with self._lock:
            found = sorted(self.index.checkpoints(), key=lambda pair: age(pair[0]))
            return [stored for _, stored in found]

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[DiskIndex]:
        """The index, for who puts the tier in order."""
        with self._lock, disk_errors(self.root):
            yield self.index

    def _use(self, key: str) -> Stored | None:
        entry = self.index.checkpoint(key)
        if entry is None or entry.stored is None:
            return None
        try:
            with self.index.open(CHECKPOINTS, key) as folder:
                check_files(folder, entry.stored)
                entry.last_used = self._clock()
                folder.touch(MANIFEST, entry.last_used)
        except CheckpointError as error:
            self._quarantine(entry, error.message)
            return None
        return entry.stored

    def _make_room(self, listing: Listing, key: str) -> None:
        # What is left of an earlier fetch becomes part of the new one.
        own = self.index.entries.get((INCOMING, key))
        victims = choose_victims(
            listing,
            [entry for entry in self.index.entries.values() if entry is not own],
            self._is_pinned,
            budget_bytes=self._budget_bytes,
            reserved_bytes=self._reserved(),
        )
        for victim in victims:
            self.num_evicted += victim.area == CHECKPOINTS
            self._discard(victim)

    def _open_incoming(self, listing: Listing, key: str) -> Incoming:
        folder = self.index.open(INCOMING, key, make=True)
        try:
            # A manifest is for what is whole; one that stands here was not believed.
            folder.remove_any(MANIFEST)
            adopted = blobs.adopt(self.index, listing, folder)
        except BaseException:
            folder.close()
            raise
        return Incoming(
            self.root,
            folder,
            listing,
            adopted,
            publish=lambda stored: self._publish(key, stored),
            release=lambda keep: self._release(key, keep=keep),
            set_digest=lambda name, digest: self.set_digest(listing.identity, name, digest),
        )

    def _publish(self, key: str, stored: Stored) -> Stored:
        with self._lock:
            stored = self.index.publish(key, stored, self._clock())
            del self._held[key]
            if damaged := self.index.entries.get((QUARANTINE, key)):
                self._discard(damaged)
            return stored

    def _release(self, key: str, *, keep: bool) -> None:
        with disk_errors(self.root):
            with self._lock:
                del self._held[key]
                self.index.enter_leftover(INCOMING, key, self._clock())
                entry = self.index.entries[INCOMING, key]
                if not keep:
                    self._discard(entry)
            self.index.empty_trash()

    def _discard(self, entry: Entry) -> None:
        self.index.discard(entry)
        if entry.stored:
            blobs.release(self.index, entry.stored)

    def _quarantine(self, entry: Entry, reason: str) -> None:
        self.index.problems.append(reason)
        self.index.quarantine(entry)
        if entry.stored:
            blobs.release(self.index, entry.stored)

    def _is_pinned(self, entry: Entry) -> bool:
        return entry.area == CHECKPOINTS and bool(self._pins[entry.key])

    def _used(self) -> int:
        return bytes_of(self.index.entries.values()) + self._reserved()

    def _reserved(self) -> int:
        return sum(listed_bytes(incoming.listing) for incoming in self._held.values())
