"""Writes to disk what is in DRAM already, so that nobody waits for the disk."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable
from typing import Protocol

from flashserve.errors import FlashServeError

_log = logging.getLogger(__name__)

_NICENESS = 10  # below who reads, serves and computes: nobody waits for the copy on disk


class ChunkStore(Protocol):
    """What of disktier.Incoming is needed here; tests record what they are given."""

    def write_chunk(self, name: str, index: int, data: memoryview, checksum: int) -> None: ...

    def complete(self) -> object: ...

    def abandon(self, keep: bool) -> None: ...


class WriteBehind:
    """One thread that writes the chunks of one checkpoint.

    Chunks are not copied: whoever gives them keeps their memory in place until `on_end`. So the
    queue is bounded by the checkpoint itself, takes no memory, and never holds up a reader. A disk
    that is full turns writing off with one line in the log; the copy in DRAM serves on.
    """

    def __init__(self, uri: str, incoming: ChunkStore, on_end: Callable[[bool], None]) -> None:
        """Starts to wait for chunks.

        Args:
            uri: names the checkpoint in the log.
            incoming: where it is written to; owned.
            on_end: told whether the checkpoint is whole on disk, from the writing thread, once it
                reads no chunk any more.
        """
        self._uri = uri
        self._incoming = incoming
        self._on_end = on_end
        self._chunks: queue.SimpleQueue[tuple[str, int, memoryview, int] | None]
        self._chunks = queue.SimpleQueue()
        self._is_whole = False
        self._has_ended = False
        self._failure: FlashServeError | None = None
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-write", daemon=True)
        self._thread.start()

    def put(self, name: str, index: int, data: memoryview, checksum: int) -> None:
        """Queues a chunk; takes a view of `data`."""
        self._chunks.put((name, index, data[:], checksum))

    def end(self, *, is_whole: bool) -> None:
        """No more will come. A checkpoint that is not whole can be resumed later."""
        self._is_whole = is_whole
        self._chunks.put(None)

    def stop(self) -> None:
        """Writes no further chunk; what is on disk can be resumed. `end` must still be called."""
        self._stopped.set()

    def give_up(self, failure: FlashServeError) -> None:
        """Writes no further chunk, and takes back what is on disk. `end` must still be called."""
        self._failure = failure
        self._stopped.set()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        step_back()
        is_on_disk = False
        try:
            is_written = self._write_all()
            if self._failure:
                raise self._failure
            if is_written and self._is_whole:
                self._incoming.complete()
                is_on_disk = True
            else:
                self._incoming.abandon(keep=True)
        except FlashServeError as error:
            _log.warning("%s is not kept on disk: %s", self._uri, error.message)
            self._give_up()
        finally:
            self._drain()
            self._on_end(is_on_disk)

    def _write_all(self) -> bool:
        """Whether every chunk that came was written."""
        while (chunk := self._take()) is not None:
            name, index, data, checksum = chunk
            with data:
                if self._stopped.is_set():
                    return False
                self._incoming.write_chunk(name, index, data, checksum)
        return True

    def _give_up(self) -> None:
        """A part that fills the disk is of no use to anybody."""
        try:
            self._incoming.abandon(keep=False)
        except FlashServeError as error:
            _log.warning("what was written of %s stays on disk: %s", self._uri, error.message)

    def _drain(self) -> None:
        while (chunk := self._take()) is not None:
            chunk[2].release()

    def _take(self) -> tuple[str, int, memoryview, int] | None:
        """The next chunk, or None once `end` was called; then always None."""
        if not self._has_ended:
            chunk = self._chunks.get()
            self._has_ended = chunk is None
            return chunk
        return None


def step_back() -> None:
    """Lowers the calling thread's priority; a process that is nicer already stays so."""
    thread = threading.get_native_id()
    niceness = max(_NICENESS, os.getpriority(os.PRIO_PROCESS, thread))
    os.setpriority(os.PRIO_PROCESS, thread, niceness)
