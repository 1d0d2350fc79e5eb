"""A model's bytes in this process: pages shared with everybody until one is written to."""

from __future__ import annotations

import mmap
import os
import socket
import weakref
from collections.abc import Callable

from flashserve.messages.handout import HandoutGrant
from flashserve.store.handout.copies import ModelCopy

_MAP_NORESERVE = 0x4000  # Linux; the mmap module does not name it


class MappedModel:
    """A private, writable mapping of one model.

    What refers to `memory` keeps the mapping, and the mapping keeps the lease: it ends with the
    last such reference, or at `release`, after which the bytes stay readable all the same.
    """

    def __init__(self, copy: ModelCopy, lease: socket.socket | None) -> None:
        """Takes both over."""
        self.grant: HandoutGrant = copy.grant
        self.release: Callable[[], object] = _nothing
        try:
            # Pages are counted against the machine's memory when they are written, not before.
            self.memory = mmap.mmap(
                copy.fd,
                copy.grant.num_bytes,
                flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                prot=mmap.PROT_READ | mmap.PROT_WRITE,
                offset=copy.grant.offset,
            )
        except BaseException:
            if lease is not None:
                lease.close()
            raise
        finally:
            copy.close()
        if lease is not None:
            end = weakref.finalize(self.memory, os.close, lease.detach())
            end.atexit = False  # the kernel does it, and what is still mapped stays leased
            self.release = end


def _nothing() -> None:
    """A model that nobody else knows of has no lease."""
