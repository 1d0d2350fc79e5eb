"""Compares checkpoints in DRAM with their checksums, a little at a time, for ever."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Generic, TypeVar

import xxhash

Tag = TypeVar("Tag")

_IDLE_S = 1.0  # until the next look, when there was nothing to compare


@dataclasses.dataclass(frozen=True, slots=True)
class ScrubPiece(Generic[Tag]):
    """One chunk in memory.

    view gives its bytes, and keeps them where they are as long as it is entered; checksum is the
    xxh3 that they should have; tag says whose they are.
    """

    view: AbstractContextManager[memoryview]
    checksum: int
    tag: Tag


class Scrubber(Generic[Tag]):
    """A background thread that takes one piece after the other and reports damaged ones.

    What to look at next, and what follows from damage, is the owner's business: both callables are
    called by the thread, and may lock.
    """

    def __init__(
        self,
        next_piece: Callable[[], ScrubPiece[Tag] | None],
        rate_bytes_per_s: int,
        on_damage: Callable[[Tag], None],
    ) -> None:
        """Starts nothing yet.

        Args:
            next_piece: the next chunk to compare, None when there is none now.
            rate_bytes_per_s: at most so many bytes are compared; more than 0.
            on_damage: told the tag of each piece that is not as it was, while nothing is held.
        """
        assert rate_bytes_per_s > 0
        self._next_piece = next_piece
        self._rate_bytes_per_s = rate_bytes_per_s
        self._on_damage = on_damage
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="store-scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when the thread has ended, at most one piece from now."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def step(self) -> float:
        """Compares one piece; how many seconds to wait until the next."""
        piece = self._next_piece()
        if piece is None:
            return _IDLE_S
        with piece.view as view:
            num_bytes = len(view)
            is_damaged = xxhash.xxh3_64_intdigest(view) != piece.checksum
        if is_damaged:
            self._on_damage(piece.tag)
        return num_bytes / self._rate_bytes_per_s

    def _run(self) -> None:
        while not self._stopping.wait(self.step()):
            pass
