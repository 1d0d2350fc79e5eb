"""Computes digests of whole files in DRAM, off the critical path."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import blake3

_log = logging.getLogger(__name__)

_NICENESS = 10  # below the server and the workers; no request waits for a digest

Pieces = Callable[[], Iterator[AbstractContextManager[memoryview] | None]]
"""Gives a file's bytes in order, each piece kept in its place only while it is entered, so that
nobody waits long for the others; None once they are gone."""

OnDone = Callable[[str, str | None], None]
"""Told the BLAKE3 in hex, and how the bytes differ from what was promised, None if they do not."""


class _Hash(Protocol):
    def update(self, data: memoryview, /) -> object: ...

    def hexdigest(self) -> str: ...


def difference(found: Mapping[str, str], promised: Mapping[str, str]) -> str | None:
    """How digests differ from what was promised; None if they do not."""
    for name, wanted in promised.items():
        if found[name] != wanted.lower():
            return f"its {name} is {found[name]}, but its origin promised {wanted}"
    return None


@dataclasses.dataclass(slots=True)
class _Job:
    """promised: by algorithm, in hex; sums: begun, by algorithm, "blake3" among them."""

    pieces: Pieces
    promised: dict[str, str]
    sums: dict[str, _Hash]
    on_done: OnDone

    def mismatch(self) -> str | None:
        found = {name: self.sums[name].hexdigest() for name in self.promised}
        return difference(found, self.promised)


class Digester:
    """One background thread, of low priority, that works off what is submitted, in order."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-digest", daemon=True)
        self._thread.start()

    def submit(self, pieces: Pieces, promised: Sequence[tuple[str, str]], on_done: OnDone) -> None:
        """Has a file's digest computed; returns at once.

        Args:
            pieces: called by the thread when it is the file's turn.
            promised: what the origin says of the file: algorithm ("blake3", or one of hashlib)
                and hex digest.
            on_done: called by the thread, while nothing is held; not called when the bytes were
                gone, or when the digester was stopped before.

        Raises:
            ValueError: an algorithm is unknown.
        """
        sums: dict[str, _Hash] = {"blake3": blake3.blake3()}
        for name, _ in promised:
            if name not in sums:
                sums[name] = hashlib.new(name, usedforsecurity=False)
        self._jobs.put(_Job(pieces, dict(promised), sums, on_done))

    def stop(self) -> None:
        """Gives up what is under way and what waits; returns when the thread has ended."""
        self._stopping.set()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while job := self._jobs.get():
            try:
                if self._work(job):
                    job.on_done(job.sums["blake3"].hexdigest(), job.mismatch())
            except Exception:
                _log.exception("a digest could not be computed, or nothing could be made of it")

    def _work(self, job: _Job) -> bool:
        """Whether the bytes were there until the end, and nobody said stop."""
        for piece in job.pieces():
            if piece is None:
                return False
            with piece as view:
                for each in job.sums.values():
                    if self._stopping.is_set():
                        return False
                    each.update(view)
        return not self._stopping.is_set()
