"""The node's checkpoints: brought into DRAM once, shared by every replica and every equal file.

Everything here blocks and is thread-safe; an asyncio caller uses asyncio.to_thread.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Protocol

from flashserve.config import StoreSettings
from flashserve.errors import ConflictError, InputError, ModelTooLargeError, UnavailableError
from flashserve.store.adapters.config import DEFAULT_MAX_RANK
from flashserve.store.adapters.tier import AdapterTier
from flashserve.store.arrival import Progress, StageReport
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.disk.budget import DiskUsage
from flashserve.store.dram.arena import Arena, ArenaUsage, ExtentState
from flashserve.store.filling import Filler
from flashserve.store.guard import Guard
from flashserve.store.images import Claimant
from flashserve.store.lease import Lease, Residence
from flashserve.store.origin import Origin, Origins
from flashserve.store.proof import Proof
from flashserve.store.reporting import Reporter, StoreReport
from flashserve.store.shelf import Shelf
from flashserve.store.versions import Versions
from flashserve.types import ModelId, ModelSpec, TensorSlice, Tier

__all__ = ["Lease", "Residence", "StageReport", "Store", "StoreListener"]

_log = logging.getLogger(__name__)


class StoreListener(Protocol):
    """Told what happens by itself, from threads of the store; must not block."""

    def damaged(self, model_ids: tuple[ModelId, ...], message: str) -> None:
        """Bytes of these models in DRAM are not what they were; who leases them must stop."""

    def on_disk(self, model_id: ModelId, num_bytes: int, seconds: float) -> None:
        """A remote model has come to disk behind its load."""

    def left_disk(self, model_id: ModelId) -> None:
        """A remote model is no longer on disk."""


class Store:
    """Sources, the disk tier and the DRAM arena of one node."""

    def __init__(
        self,
        data_dir: Path,
        dram_bytes: int,
        prefault: bool,
        settings: StoreSettings | None = None,
        *,
        adapter_bytes: int = 0,
        max_lora_rank: int = DEFAULT_MAX_RANK,
    ) -> None:
        """Makes an arena of `dram_bytes`, rounded down to whole 2 MiB.

        Args:
            data_dir: where the disk tier is.
            dram_bytes: for models and adapters.
            prefault: see Arena.
            settings: how bytes move.
            adapter_bytes: how many of dram_bytes are for adapters alone.
            max_lora_rank: adapters of a higher one are refused.

        Raises:
            InputError: the arena cannot be made.
        """
        settings = settings or StoreSettings()
        self.listener: StoreListener | None = None
        self.arena = Arena(
            dram_bytes,
            prefault=prefault,
            huge_pages=settings.huge_pages,
            packed_bytes=adapter_bytes,
        )
        self._origins = Origins(data_dir, settings)
        self._versions = Versions(self._origins, settings.recheck_s)
        self._shelf = Shelf(self.arena)
        self._guard = Guard(self._shelf, self.arena, settings.scrub_bytes_per_s, self._damaged)
        self._proof = Proof(self._shelf, self.arena, self._origins, settings, self._damaged)
        self._filler = Filler(
            self._shelf,
            self.arena,
            self._origins,
            self._proof,
            settings,
            self._on_disk,
            self._left_disk,
        )
        self._reporter = Reporter(
            self.arena, self._shelf, self._guard, self._origins, self._filler.transfers
        )
        self.adapters = AdapterTier(self.arena, self._origins, settings, max_lora_rank)
        self._stopping = threading.Event()
        # Where each model comes from, as far as this store was asked for it.
        self._sources: dict[ModelId, str] = {}

    def close(self) -> None:
        """Ends reads under way, then gives all memory, threads and descriptors back."""
        self._stopping.set()
        self._filler.close()
        self._proof.close()
        self._guard.close()
        self.adapters.close()
        self._versions.close()
        self._origins.close()
        self.arena.close()

    def inspect(self, uri: str) -> Snapshot:
        """Reads and checks a source that is to be served here; moves no weights.

        Raises:
            DeployError: it cannot be served; one line that says which file and why.
        """
        snapshot = self._origins.snapshot(self._origins.look(uri))
        needed, total = snapshot.arena_bytes, self.usage().total
        if needed > total:
            raise ModelTooLargeError(
                f"{snapshot.uri} holds {snapshot.size_bytes} bytes of weights and needs {needed} "
                f"of memory; of the arena's {self.arena.num_bytes} are {total} for models: raise "
                "node.dram_bytes"
            )
        return snapshot

    def stage(self, model: ModelSpec, tier: Tier, progress: Progress | None = None) -> StageReport:
        """Brings a model's bytes up to `tier`, DISK or DRAM, unless they are there.

        Asks the source. Calls for the same bytes share one read. A source that changed since it was
        last staged is read again; a replica that still leases the old bytes keeps them.

        Args:
            model: source and id; the id names the bytes from here on.
            tier: how near they shall be.
            progress: told bytes done and bytes in all, from another thread.

        Raises:
            SourceError, CheckpointError, UnsupportedModelError: the source cannot be read.
            ModelTooLargeError: the whole arena is too small.
            UnavailableError: the arena or the disk has no room now, or the store is closed.
            ConflictError: the model was deleted meanwhile.
        """
        if tier not in {Tier.DISK, Tier.DRAM}:
            raise InputError(f"a model is staged to disk or dram, not to {tier.label}")
        if tier is Tier.DISK:
            return self._stage_to_disk(model)
        with self._read(model, progress) as lease:
            report = lease.arrival.wait()
            if model.model_id not in self._shelf.models():
                raise ConflictError("the model was deleted while it was staged")
        return report

    def hold(self, model: ModelSpec) -> Lease:
        """Leases a model whose bytes are in DRAM, or will be: `Lease.arrival` tells how far it is.

        Returns when the layout is known and the places are claimed. A remote model that is in DRAM
        is leased without asking anybody; its source is looked at behind (versions.py), so that a
        version that is new there is read by the next call.

        Raises:
            As for `stage`, but for what reading the weights brings: `Lease.arrival.wait` raises it.
        """
        return self._hit(model) or self._read(model, None)

    def lease(self, model_id: ModelId) -> Lease:
        """Keeps the bytes of a model that is whole in DRAM in place until the lease is released.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        image = self._shelf.lease(model_id)
        return Lease(self._shelf, image, model_id, image.arrived())

    def tensors(self, model_id: ModelId) -> tuple[TensorSlice, ...]:
        """Where each tensor lies in the arena; holds only as long as the model is leased.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        return self._shelf.whole(model_id).tensors()

    def extents(self, model_id: ModelId) -> tuple[tuple[int, int], ...]:
        """Offset and bytes of each file's memory; holds only as long as the model is leased.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        return self._shelf.whole(model_id).extents()

    def snapshot(self, model_id: ModelId) -> Snapshot:
        """Config and layout as they were when the model's bytes were read.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        return self._shelf.whole(model_id).snapshot

    def verify(self, model_id: ModelId) -> None:
        """Compares the bytes in DRAM with the checksums taken when they were read.

        Raises:
            CheckpointError: they differ, and are not served any more; names file and bytes.
            ConflictError: the model is not in DRAM.
        """
        with self.lease(model_id):
            self._guard.verify(self._shelf.whole(model_id))

    def evict(self, model_id: ModelId, tier: Tier) -> int:
        """Takes a model out of `tier` and those above it; how many bytes of DRAM that freed.

        Bytes that another model shares stay, and so do files of a local source, which are not
        ours. Ends a read that nobody waits for, and waits for what is written to disk behind.

        Raises:
            ConflictError: the model is leased, or is being staged.
        """
        if tier > Tier.DRAM:
            return 0
        files = self._shelf.evict(model_id)
        self._filler.wait_left(files)
        if tier <= Tier.DISK:
            self._evict_from_disk(model_id)
        gone = (file for file in files if file.extent.state is ExtentState.FREED)
        return sum(file.extent.num_bytes for file in gone)

    def forget(self, model_id: ModelId) -> None:
        """The model was deleted: its bytes go as soon as nobody leases or shares them."""
        self._shelf.forget(model_id)
        uri = self._sources.pop(model_id, None)
        if uri and uri not in self._sources.values():
            self._versions.forget(uri)

    def tier(self, model: ModelSpec) -> Tier:
        """The highest tier of the store that holds all of the model's bytes."""
        image = self._shelf.models().get(model.model_id)
        if image is not None and image.is_whole and image.snapshot.uri == model.source:
            return Tier.DRAM
        if model.lowest_tier is Tier.REMOTE and self._origins.on_disk(model.source):
            return Tier.DISK
        return model.lowest_tier

    def usage(self) -> ArenaUsage:
        return self.arena.usage()

    def disk_usage(self) -> DiskUsage:
        """Of the disk tier; all 0 where another process has it."""
        disk = self._origins.disk
        return disk.usage() if disk else DiskUsage(0, 0, 0)

    def report(self) -> StoreReport:
        """What the tiers hold and do just now."""
        return self._reporter.report()

    def dram_bytes(self, model_id: ModelId) -> int:
        """Bytes of the arena that the model takes, alone or with others; 0 when it is not there."""
        image = self._shelf.models().get(model_id)
        return image.num_bytes if image else 0

    def residents(self) -> dict[ModelId, Residence]:
        """The models that have bytes in DRAM or in the disk tier, of those that were asked for."""
        images, found = self._shelf.models(), {}
        for model_id, uri in list(self._sources.items()):
            image, stored = images.get(model_id), self._origins.on_disk(uri)
            if image or stored:
                is_whole = image is not None and image.is_whole
                tier = Tier.DRAM if is_whole else Tier.DISK if stored else Tier.REMOTE
                found[model_id] = Residence(
                    tier,
                    image.num_bytes if image else 0,
                    stored.num_bytes if stored else 0,
                    image.leases.total() if image else 0,
                )
        return found

    def _hit(self, model: ModelSpec) -> Lease | None:
        """A lease of a remote model that is whole in DRAM."""
        if (identity := self._versions.current(model.source)) is None:
            return None
        image = self._shelf.find(identity, model.model_id, is_whole=True)
        if image is None:
            return None
        self._sources[model.model_id] = model.source
        self._versions.recheck(model.source)
        return Lease(self._shelf, image, model.model_id, image.arrived())

    def _read(self, model: ModelSpec, progress: Progress | None) -> Lease:
        """A lease of what the source holds now, which is read unless it is there."""
        began = time.monotonic()
        origin = self._look(model)
        looked_s = time.monotonic() - began
        image, fill = self._shelf.find(origin.listing.identity, model.model_id), None
        if is_new := image is None:
            snapshot = self._origins.snapshot(origin)
            files = [origin.file(file.name) for file in snapshot.layout.files]
            image, fill = self._shelf.claim(snapshot, files, model.model_id, origin)
        num_bytes = fill.num_bytes if fill else 0
        is_fetched = image.is_fetched

        def report(seconds: float) -> StageReport:
            fetch_s, dram_s = (seconds, 0.0) if is_fetched else (0.0, seconds)
            return StageReport(num_bytes, looked_s + fetch_s, dram_s)

        is_hit = image.is_whole
        arrival = image.arrival((lambda _: StageReport()) if is_hit else report)
        if progress and not is_hit:
            arrival.listen(progress)
        lease = Lease(self._shelf, image, model.model_id, arrival)
        if is_new:
            self._filler.start(Claimant(model.model_id, image, origin), fill)
        return lease

    def _look(self, model: ModelSpec) -> Origin:
        if self._stopping.is_set():
            raise UnavailableError("the store is closed")
        self._sources[model.model_id] = model.source
        origin = self._origins.look(model.source)
        self._versions.saw(origin)
        return origin

    def _stage_to_disk(self, model: ModelSpec) -> StageReport:
        began = time.monotonic()
        num_bytes = self._filler.fetch(self._look(model), model.model_id, self._stopping)
        return StageReport(num_bytes, time.monotonic() - began)

    def _evict_from_disk(self, model_id: ModelId) -> None:
        uri, disk = self._sources.get(model_id), self._origins.disk
        while uri and disk and (stored := self._origins.on_disk(uri)):
            disk.evict(stored.listing.identity)
            self._left_disk(model_id)

    def _on_disk(self, model_id: ModelId, num_bytes: int, seconds: float) -> None:
        if self.listener:
            self.listener.on_disk(model_id, num_bytes, seconds)

    def _left_disk(self, model_id: ModelId) -> None:
        if self.listener:
            self.listener.left_disk(model_id)

    def _damaged(self, model_ids: tuple[ModelId, ...], message: str) -> None:
        _log.error("%s; it is read again when it is needed", message)
        if self.listener:
            self.listener.damaged(model_ids, message)
