"""How a model's copy for other processes comes to be, and how that is given up."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Collection
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.errors import ConflictError, UnavailableError
from flashserve.store.arrival import Arrival
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.handout.copies import ModelCopy, copy_lease, read_copy, reading_store
from flashserve.store.sources.source import open_source
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec, Tier

_numbers = itertools.count()


class _NoRoomError(Exception):
    """The arena cannot take a model now."""


class CopyJob:
    """Makes one copy, in a thread that may wait for minutes, unless it is stopped.

    Args:
        snapshot: what to copy.
        models: whose bytes the node may have in DRAM already.
        store: the node's.
        settings: for what is read past the node's store.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        models: Collection[ModelId],
        store: Store,
        data_dir: Path,
        settings: StoreSettings,
    ) -> None:
        self.snapshot = snapshot
        self._models = models
        self._store = store
        self._data_dir = data_dir
        self._settings = settings
        self._lock = threading.Lock()
        self._is_stopped = False
        self._arrival: Arrival | None = None

    def run(self) -> ModelCopy:
        """From the arena if the bytes are there, else from the source: the arena's room belongs
        to who serves. What is remote passes through it, because the disk tier is behind it.

        Raises:
            FlashServeError: it cannot be read.
            UnavailableError: there is no memory for it, or it was stopped.
        """
        if lease := self._resident():
            with lease:
                return copy_lease(lease, self._store.arena)
        uri = self.snapshot.uri
        if open_source(uri, self._data_dir, self._settings).lowest_tier is Tier.REMOTE:
            with contextlib.suppress(_NoRoomError):
                return self._through_arena(uri)
        with contextlib.closing(reading_store(self._data_dir, self._settings)) as store:
            return read_copy(store, uri, self._wait)

    def stop(self) -> None:
        """Nobody wants the copy any more. Returns at once; `run` gives up what it waits for."""
        with self._lock:
            self._is_stopped = True
            if self._arrival is not None:
                self._arrival.fail(_nobody_waits())

    def _through_arena(self, uri: str) -> ModelCopy:
        model = ModelSpec(ModelId(f"#handout-{next(_numbers)}"), uri, 0)  # nobody's name
        try:
            with self._hold(model) as lease:
                self._wait(lease.arrival)
                return copy_lease(lease, self._store.arena)
        finally:
            self._store.forget(model.model_id)

    def _hold(self, model: ModelSpec) -> Lease:
        try:
            return self._store.hold(model)
        except UnavailableError as error:
            raise _NoRoomError from error

    def _wait(self, arrival: Arrival) -> None:
        with self._lock:
            if self._is_stopped:
                raise _nobody_waits()
            self._arrival = arrival
        arrival.wait()

    def _resident(self) -> Lease | None:
        for model_id in self._models:
            with contextlib.suppress(ConflictError):  # it is not in DRAM
                if self._store.snapshot(model_id).identity == self.snapshot.identity:
                    return self._store.lease(model_id)
        return None


def _nobody_waits() -> UnavailableError:
    return UnavailableError("nobody waits for the copy any more")
