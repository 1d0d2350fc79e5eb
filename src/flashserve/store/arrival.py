"""Bytes on their way into DRAM, as those see them who want to compute with the first ones."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Sequence

from flashserve.errors import FlashServeError, InternalError, error_from_code

FAILED = -1
Opened = Callable[[int], None]
"""Told how many groups are open, or FAILED."""
Progress = Callable[[int, int], None]
"""Told bytes done and bytes in all."""


@dataclasses.dataclass(frozen=True, slots=True)
class StageReport:
    """What a load did itself: num_bytes is 0 for a hit, and for who waited for another.

    fetch_s: until the files were on this machine; dram_s: from there until they were in DRAM.
    """

    num_bytes: int = 0
    fetch_s: float = 0.0
    dram_s: float = 0.0


class Arrival:
    """Groups of a model's tensors (order.groups), which open one after another.

    A group is open when all its chunks, and all those of the groups before it, are in DRAM and
    verified. Thread-safe. Subscribers and listeners are called by one thread at a time and in
    order, from threads that read: they must not block, and must not call the store.
    """

    def __init__(
        self,
        pending: Sequence[int],
        *,
        num_bytes: int = 0,
        report: Callable[[float], StageReport] = lambda _: StageReport(),
        is_fetched: bool = False,
    ) -> None:
        """Args:
        pending: chunks that each group still lacks.
        num_bytes: those of all the files, for `listen`.
        report: what `wait` returns, from the seconds that it all took.
        is_fetched: the bytes come from far away.
        """
        self.num_groups = len(pending)
        self.is_fetched = is_fetched
        self._pending = list(pending)
        self._num_bytes = num_bytes
        self._num_bytes_done = 0
        self._make_report = report
        self._began = time.monotonic()
        self._report: StageReport | None = None
        self._error: BaseException | None = None
        self._num_open = 0
        self._subscribers: list[Opened] = []
        self._listeners: list[Progress] = []
        self._ended = threading.Event()
        # Reentrant, as a subscriber may ask the arrival that calls it.
        self._lock = threading.RLock()
        with self._lock:
            self._open()

    @property
    def num_open(self) -> int:
        return self._num_open

    @property
    def is_complete(self) -> bool:
        """Every group is open: nothing will change any more."""
        return self._num_open == self.num_groups

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def subscribe(self, subscriber: Opened) -> None:
        """Calls it at once with the number of open groups, then whenever that has grown, and with
        FAILED when the rest will not come.
        """
        with self._lock:
            self._subscribers.append(subscriber)
            subscriber(FAILED if self._error is not None else self._num_open)

    def listen(self, listener: Progress) -> None:
        """Calls it after each chunk that comes."""
        with self._lock:
            self._listeners.append(listener)

    def wait(self) -> StageReport:
        """Returns when everything is there.

        Raises:
            FlashServeError: it will not come; what the reading raised.
        """
        self._ended.wait()
        if isinstance(self._error, FlashServeError):
            raise error_from_code(self._error.code, self._error.message)
        if self._error is not None:
            raise InternalError(f"reading the checkpoint failed: {self._error!r}")
        assert self._report is not None
        return self._report

    def add(self, group: int, num_bytes: int) -> None:
        """Something that `group` is the first to need is there and verified: a chunk of so many
        bytes, or 0 for the word that a file is complete.
        """
        with self._lock:
            if self._error is not None:
                return
            assert self._pending[group] > 0
            self._pending[group] -= 1
            self._num_bytes_done += num_bytes
            if num_bytes:
                for listener in self._listeners:
                    listener(self._num_bytes_done, self._num_bytes)
            if self._open():
                self._tell(self._num_open)

    def fail(self, error: BaseException) -> None:
        """What is not open yet never will be. Harmless when all is there, and a second time."""
        with self._lock:
            if self._ended.is_set():
                return
            self._error = error
            self._ended.set()
            self._tell(FAILED)

    def _open(self) -> bool:
        """Opens what can be; whether that was any."""
        before = self._num_open
        while self._num_open < self.num_groups and not self._pending[self._num_open]:
            self._num_open += 1
        if self.is_complete and not self._ended.is_set():
            self._report = self._make_report(time.monotonic() - self._began)
            self._ended.set()
        return self._num_open > before

    def _tell(self, num_open: int) -> None:
        for subscriber in self._subscribers:
            subscriber(num_open)
