"""Writes files of the disk tier anew in which a load found damage, behind that load."""

from __future__ import annotations

import collections
import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.errors import ConflictError, FlashServeError, UnavailableError
from flashserve.store.behind import step_back
from flashserve.store.disk.checking import Findings
from flashserve.store.disk.fsck import repair_file
from flashserve.store.disk.manifest import Stored
from flashserve.store.disk.tier import DiskTier
from flashserve.store.images import FileImage
from flashserve.store.origin import Origin, Origins
from flashserve.store.refetching import Refetcher
from flashserve.store.shelf import Shelf
from flashserve.types import ModelId

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Job:
    origin: Origin
    stored: Stored
    file: FileImage
    name: str
    chunks: frozenset[int]
    model_id: ModelId


class Mender:
    """One thread of low priority that works off what is submitted, in order."""

    def __init__(
        self,
        shelf: Shelf,
        origins: Origins,
        settings: StoreSettings,
        lost: Callable[[ModelId], None],
    ) -> None:
        """lost: told a model whose copy on disk could not be mended, and is not served any more."""
        self._shelf = shelf
        self._origins = origins
        self._settings = settings
        self._lost = lost
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._waiting: collections.Counter[FileImage] = collections.Counter()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def submit(
        self,
        origin: Origin,
        file: FileImage,
        name: str,
        chunks: Collection[int],
        model_id: ModelId,
    ) -> None:
        """Has a file's copy on disk mended; returns at once.

        Args:
            origin: where the load read from; its copy on disk has the damage.
            file: as it is in DRAM by now, whole and right.
            name: what this origin calls it.
            chunks: indexes of the damaged ones; none is fine.
            model_id: for whom it was loaded.
        """
        if not chunks or origin.stored is None:
            return
        with self._changed:
            if self._stopping.is_set():
                return
            self._waiting[file] += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="store-mend", daemon=True)
                self._thread.start()
        self._jobs.put(_Job(origin, origin.stored, file, name, frozenset(chunks), model_id))

    def wait(self, files: Iterable[FileImage]) -> None:
        """Returns when no copy of any of these files is being mended, or waits for that."""
        wanted = set(files)
        with self._changed:
            self._changed.wait_for(lambda: not any(self._waiting[file] for file in wanted))

    def close(self) -> None:
        """Gives up what is under way: the next load finds the damage again."""
        with self._changed:
            self._stopping.set()
            thread = self._thread
        self._jobs.put(None)
        if thread:
            thread.join()

    def _run(self) -> None:
        step_back()
        while job := self._jobs.get():
            try:
                if self._origins.disk is not None and not self._stopping.is_set():
                    self._mend(self._origins.disk, job)
            except Exception:
                _log.exception("mending %s failed", job.file.path)
            finally:
                with self._changed:
                    self._waiting[job.file] -= 1
                    self._changed.notify_all()

    def _mend(self, disk: DiskTier, job: _Job) -> None:
        identity, name = job.stored.listing.identity, job.name
        spans = Findings(job.chunks).ranges(job.file.file)
        where = ", ".join(f"{begin}-{end}" for begin, end in spans)
        damage = f"bytes {where} of {job.stored.directory / name} were damaged on disk"
        try:
            with self._refetcher(job) as refetch:
                repair_file(
                    disk,
                    identity,
                    name,
                    job.chunks,
                    lambda index: self._good(job, index, refetch),
                    self._advance,
                )
        except ConflictError:
            return  # it has left the disk
        except FlashServeError as error:
            if self._stopping.is_set():
                return
            _log.error("%s; the copy is not served any more: %s", damage, error.message)
            self._origins.distrust(job.origin, damage)
            self._lost(job.model_id)
        else:
            _log.warning("%s, and are mended", damage)

    def _good(self, job: _Job, index: int, refetch: Refetcher) -> bytes:
        """A chunk out of DRAM, or from the source when it has left there."""
        view = self._shelf.look_at(job.file, index)
        if view is None:
            return refetch(job.stored, job.name, index)
        with view as data:
            return bytes(data)

    def _refetcher(self, job: _Job) -> Refetcher:
        return Refetcher(Path(), self._settings, lambda *_: job.origin.source)

    def _advance(self, _: int) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the store is closing")
