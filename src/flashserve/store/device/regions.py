"""The arena as a device sees it: host memory that is registered once, in pieces."""

from __future__ import annotations

import mmap
from typing import Protocol

import numpy as np

from flashserve.errors import UnavailableError

PIECE_BYTES = 1 << 30
"""One registration. A single one of hundreds of GiB fails, and long ones disturb serving."""


def address_of(mapping: mmap.mmap) -> int:
    """Where a mapping lies in this process, for as long as somebody keeps it."""
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


class Registrar(Protocol):
    """Pins host memory for a device, so that copies from it run at link speed by themselves."""

    def register(self, address: int, num_bytes: int) -> None:
        """Raises UnavailableError when the device refuses; nothing is pinned then."""

    def unregister(self, address: int) -> None: ...


class RegisteredArena:
    """A worker's mapping of the arena, registered with its device from worker start to `close`.

    A device that refuses a piece is not asked for more: copies from the rest go the slow way,
    through pageable memory, and `refusal` says why. Take the pages from the kernel before.

    Args:
        address: of the mapping, which outlives this object.
    """

    def __init__(
        self,
        registrar: Registrar,
        address: int,
        num_bytes: int,
        *,
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        self.address = address
        self.num_bytes = num_bytes
        self.boundaries = tuple(range(piece_bytes, num_bytes, piece_bytes))
        """Offsets that no copy may cross."""
        self.registered_bytes = 0
        self.refusal: str | None = None
        self._registrar = registrar
        self._pieces: list[int] = []
        for begin in (0, *self.boundaries):
            size = min(piece_bytes, num_bytes - begin)
            try:
                registrar.register(address + begin, size)
            except UnavailableError as error:
                self.refusal = error.message
                break
            except BaseException:
                self.close()
                raise
            self._pieces.append(address + begin)
            self.registered_bytes += size

    def close(self) -> None:
        """Unregisters every piece; no copy may be under way. More than once does no harm."""
        while self._pieces:
            self._registrar.unregister(self._pieces.pop())
        self.registered_bytes = 0
