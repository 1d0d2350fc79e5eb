"""Looks after the bytes in DRAM: compares them with their checksums, and withdraws damaged ones."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.dram.arena import Arena
from flashserve.store.images import FileImage, Image
from flashserve.store.pipeline import checksum
from flashserve.store.scrub import Scrubber, ScrubPiece
from flashserve.store.shelf import Shelf
from flashserve.types import ModelId

Damaged = Callable[[tuple[ModelId, ...], str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    file: FileImage
    index: int


@dataclasses.dataclass(frozen=True, slots=True)
class ScrubReport:
    """How far the round through all files is. rate_bytes_per_s: 0 for a scrub that is off.

    num_rounds: how many came to their end; ended_s: seconds since the last of them did.
    """

    rate_bytes_per_s: int = 0
    done_bytes: int = 0
    round_bytes: int = 0
    num_rounds: int = 0
    ended_s: float | None = None


class Guard:
    """Scrubs all whole files in turn, in the background, unless the rate is 0.

    Args:
        damaged: told the models that had damaged bytes, which are withdrawn by then.
    """

    def __init__(self, shelf: Shelf, arena: Arena, rate_bytes_per_s: int, damaged: Damaged) -> None:
        self._shelf = shelf
        self._arena = arena
        self._damaged = damaged
        self.num_damaged = 0
        """Chunks that were found damaged, by the scrub or by `verify`."""
        self._rate_bytes_per_s = rate_bytes_per_s
        # Of the round; written by the scrub's thread alone.
        self._done_bytes = self._round_bytes = self._num_rounds = 0
        self._ended_at: float | None = None
        self._round: Iterator[_Place] = iter(())
        self._scrubber: Scrubber[_Place] | None = None
        if rate_bytes_per_s:
            self._scrubber = Scrubber(self.next_piece, rate_bytes_per_s, self.found)
            self._scrubber.start()

    def close(self) -> None:
        if self._scrubber:
            self._scrubber.stop()

    def verify(self, image: Image) -> None:
        """Compares all chunks of a leased image.

        Raises:
            CheckpointError: one is damaged, and withdrawn.
        """
        for file in image.files:
            for index in range(file.file.num_chunks):
                with self._arena.memory(file.extent) as memory, file.chunk(memory, index) as data:
                    is_good = checksum(data) == file.checksums[index]
                if not is_good:
                    raise CheckpointError(self._withdraw(_Place(file, index)))

    def next_piece(self) -> ScrubPiece[_Place] | None:
        """The next chunk of a round through all files; None at the end of a round."""
        for place in self._round:
            self._done_bytes += place.file.chunk_bytes(place.index)
            if (view := self._shelf.look_at(place.file, place.index)) is not None:
                return ScrubPiece(view, place.file.checksums[place.index], place)
        if self._round_bytes:
            self._num_rounds += 1
            self._ended_at = time.monotonic()
        files = self._shelf.files()
        self._done_bytes, self._round_bytes = 0, sum(file.file.num_bytes for file in files)
        self._round = (
            _Place(file, index) for file in files for index in range(file.file.num_chunks)
        )
        return None

    def report(self) -> ScrubReport:
        ended_s = None if self._ended_at is None else time.monotonic() - self._ended_at
        return ScrubReport(
            self._rate_bytes_per_s, self._done_bytes, self._round_bytes, self._num_rounds, ended_s
        )

    def found(self, place: _Place) -> None:
        """A piece is damaged."""
        self._withdraw(place)

    def _withdraw(self, place: _Place) -> str:
        self.num_damaged += 1
        file, begin = place.file, place.index * CHUNK_BYTES
        message = (
            f"the copy of {file.path} in DRAM is damaged between its bytes {begin} and "
            f"{begin + file.chunk_bytes(place.index)}"
        )
        self._damaged(self._shelf.quarantine(file), message)
        return message
