"""Compares whole files in DRAM with what their origin promised of them, and finds equal ones."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator

from flashserve.config import StoreSettings
from flashserve.store.digest import Digester, difference
from flashserve.store.dram.arena import Arena
from flashserve.store.images import FileImage
from flashserve.store.origin import Origin, Origins
from flashserve.store.shelf import Shelf
from flashserve.types import ModelId

Damaged = Callable[[tuple[ModelId, ...], str], None]


class Proof:
    """A transfer may change bytes that no checksum is known of yet: the first one of a version.

    Args:
        damaged: told the models that had bytes which are not what was promised; withdrawn by then.
    """

    def __init__(
        self,
        shelf: Shelf,
        arena: Arena,
        origins: Origins,
        settings: StoreSettings,
        damaged: Damaged,
    ) -> None:
        self._shelf = shelf
        self._arena = arena
        self._origins = origins
        self._settings = settings
        self._damaged = damaged
        self._digester = Digester()

    def close(self) -> None:
        self._digester.stop()

    def comes_first(self, origin: Origin, file: FileImage) -> bool:
        """Whether a file must be proved before anybody computes with it."""
        if not origin.is_fetched or not file.file.digests:
            return False
        when = self._settings.verify_fetches
        return when == "always" or (when == "auto" and not origin.listing.is_protected)

    def mismatch(self, file: FileImage) -> str | None:
        """How a file that has been read differs from what was promised of it, computed now."""
        promised = dict(file.file.digests)
        sums = {name: hashlib.new(name, usedforsecurity=False) for name in promised}
        with self._arena.memory(file.extent) as memory:
            for index in range(file.file.num_chunks):
                with file.chunk(memory, index) as data:
                    for each in sums.values():
                        each.update(data)
        return difference({name: each.hexdigest() for name, each in sums.items()}, promised)

    def submit(self, origin: Origin, file: FileImage, name: str) -> None:
        """Has a file proved, and its BLAKE3 computed, in the background. By now it is on disk, if
        it is to be there, where `name` is what this origin calls it.
        """
        is_proved = self.comes_first(origin, file) or not origin.is_fetched

        def done(digest: str, difference: str | None) -> None:
            if difference is not None:
                message = f"{file.path} was damaged on its way here: {difference}"
                self._origins.distrust(origin, message)
                self._damaged(self._shelf.quarantine(file), message)
                return
            self._shelf.identify(file, digest)
            self._origins.set_digest(origin, name, digest)

        self._digester.submit(
            lambda: self._pieces(file), () if is_proved else file.file.digests, done
        )

    def _pieces(
        self, file: FileImage
    ) -> Iterator[contextlib.AbstractContextManager[memoryview] | None]:
        for index in range(file.file.num_chunks):
            yield self._shelf.look_at(file, index)
