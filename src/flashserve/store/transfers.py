"""Reads that are under way, and how many bytes all of them have brought."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from flashserve.types import ModelId, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class Fetch:
    """A read that is under way, of a model's bytes towards `to_tier`.

    from_tier: REMOTE, or DISK for the files of this machine, those of the disk tier included.
    done_bytes: of total_bytes, what an earlier, interrupted read had left included;
    bytes_per_s: of this read since it began, 0 before its first bytes.
    """

    model_id: ModelId
    source: str
    from_tier: Tier
    to_tier: Tier
    done_bytes: int
    total_bytes: int
    elapsed_s: float
    bytes_per_s: float


class Transfer:
    """One read, as its threads count what they have done. Thread-safe."""

    def __init__(
        self, source: str, model_id: ModelId, from_tier: Tier, to_tier: Tier, total_bytes: int
    ) -> None:
        self.source = source
        self.model_id = model_id
        self.from_tier = from_tier
        self.to_tier = to_tier
        self.total_bytes = total_bytes
        self.began_at = 0.0
        self.num_read = 0
        self._num_found = 0
        self._lock = threading.Lock()

    def read(self, num_bytes: int) -> None:
        """So many bytes more have come."""
        with self._lock:
            self.num_read += num_bytes

    def found(self, num_bytes: int) -> None:
        """So many bytes more are there from an earlier read."""
        with self._lock:
            self._num_found += num_bytes

    def at(self, now: float) -> Fetch:
        elapsed_s = max(now - self.began_at, 0.0)
        # What was damaged and is read again counts as read, but brings the end no nearer.
        done = min(self.num_read + self._num_found, self.total_bytes)
        rate = self.num_read / elapsed_s if elapsed_s else 0.0
        return Fetch(
            self.model_id,
            self.source,
            self.from_tier,
            self.to_tier,
            done,
            self.total_bytes,
            elapsed_s,
            rate,
        )


class Transfers:
    """The reads of one store. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[Transfer, None] = {}
        self._ended: collections.Counter[Tier] = collections.Counter()

    @contextlib.contextmanager
    def running(self, transfer: Transfer) -> Iterator[Transfer]:
        """Shows a read as long as it is entered; its bytes count for good, also if it fails."""
        transfer.began_at = self._clock()
        with self._lock:
            self._running[transfer] = None
        try:
            yield transfer
        finally:
            with self._lock:
                del self._running[transfer]
                self._ended[transfer.from_tier] += transfer.num_read

    def fetches(self) -> tuple[Fetch, ...]:
        """Those under way, the oldest first."""
        now = self._clock()
        with self._lock:
            return tuple(transfer.at(now) for transfer in self._running)

    def read_bytes(self) -> Mapping[Tier, int]:
        """Bytes that ever came, by the tier that they came from; it never falls."""
        with self._lock:
            read = self._ended.copy()
            for transfer in self._running:
                read[transfer.from_tier] += transfer.num_read
        return {tier: read[tier] for tier in (Tier.REMOTE, Tier.DISK)}
