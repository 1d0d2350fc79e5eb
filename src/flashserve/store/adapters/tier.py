"""The adapters of one node, in a zone of the arena that is theirs: the longest unused leaves first.

Everything here blocks, unless it says otherwise, and is thread-safe.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator

from flashserve.config import StoreSettings
from flashserve.errors import ConflictError, UnavailableError
from flashserve.messages.work import LoraLayer
from flashserve.store.adapters.layout import AdapterSnapshot, check_base, read_adapter
from flashserve.store.adapters.values import check_copies, check_values
from flashserve.store.arrival import StageReport
from flashserve.store.checkpoint.layout import Layout, TensorEntry
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.dram.arena import Arena, ArenaUsage
from flashserve.store.filling import Filler
from flashserve.store.guard import Guard
from flashserve.store.images import Claimant, Image
from flashserve.store.origin import Origin, Origins
from flashserve.store.proof import Proof
from flashserve.store.shelf import Shelf
from flashserve.types import AdapterSpec, ModelId, ModelSpec, TensorSlice, Tier

_log = logging.getLogger(__name__)

OnDamage = Callable[[tuple[str, ...], str], None]
"""Told identities of adapters whose bytes in DRAM were damaged, and a message."""


class AdapterLease:
    """Keeps an adapter's bytes where they are until it is released.

    layers say where that is, in bytes of the arena.
    """

    def __init__(
        self, shelf: Shelf, image: Image, identity: str, layers: tuple[LoraLayer, ...]
    ) -> None:
        """Of an image that was leased for this."""
        self.identity = identity
        self.num_bytes = image.num_bytes
        self.layers = layers
        self._shelf = shelf
        self._lock = threading.Lock()
        self.image = image
        self._is_released = False

    def release(self) -> None:
        """Ends the lease; more than once does no harm."""
        with self._lock:
            was_released, self._is_released = self._is_released, True
        if not was_released:
            self._shelf.release(self.image, ModelId(self.identity))

    def __enter__(self) -> AdapterLease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class AdapterTier:
    """Adapters that are in DRAM, or come there; named by their identity, so equal ones are one.

    Args:
        arena: whose packed zone is theirs alone.
        origins: where adapters come from; owned by the caller.
        max_rank: see `read_adapter`.
    """

    def __init__(
        self, arena: Arena, origins: Origins, settings: StoreSettings, max_rank: int
    ) -> None:
        self.on_damage: OnDamage | None = None
        self._zone = arena.packed
        self._origins = origins
        self._max_rank = max_rank
        self._shelf = Shelf(self._zone)
        rate = settings.scrub_bytes_per_s if self._zone.usage().total else 0
        self._guard = Guard(self._shelf, arena, rate, self._damaged)
        self._proof = Proof(self._shelf, arena, origins, settings, self._damaged)
        self._filler = Filler(
            self._shelf, arena, origins, self._proof, settings, _ignore_disk, _ignore_disk
        )
        self._lock = threading.Lock()
        # The one that was used last is at the end.
        self._entries: collections.OrderedDict[str, _Entry] = collections.OrderedDict()

    def close(self) -> None:
        """Ends reads under way, and the threads."""
        self._filler.close()
        self._proof.close()
        self._guard.close()

    def admit(self, uri: str, base: ModelSpec) -> AdapterSnapshot:
        """Reads an adapter into DRAM, and checks all of it: it can be registered for `base`.

        Raises:
            DeployError: it cannot be served on that base; one line that says why.
            UnavailableError: there is no room for it now.
        """
        base_origin = self._origins.look(base.source)
        base_snapshot = self._origins.snapshot(base_origin)
        origin = self._origins.look(uri)
        files = self._origins.files(origin)
        adapter = read_adapter(files, uri, origin.listing.identity, self._max_rank)
        check_base(adapter, base_snapshot.layout, f"model {base.model_id}")
        with self._stage(origin, adapter) as lease:
            try:
                self._check(adapter, lease.image, base_origin, base_snapshot.layout)
            except BaseException:
                self.forget(adapter.identity)
                raise
        return adapter

    def hold(self, spec: AdapterSpec) -> AdapterLease:
        """Leases a registered adapter, which is brought into DRAM unless it is there.

        Calls for the same bytes share one read. What nobody leases makes room.

        Raises:
            CheckpointError: the source holds another version by now, or is damaged.
            SourceError: it cannot be read.
            ModelTooLargeError: the whole zone is too small.
            UnavailableError: there is no room now: everything in the zone is leased.
        """
        if lease := self.lease(spec.identity):
            return lease
        origin = self._origins.version(spec.source, spec.identity)
        files = self._origins.files(origin)
        adapter = read_adapter(files, spec.source, spec.identity, self._max_rank)
        return self._stage(origin, adapter)

    def lease(self, identity: str) -> AdapterLease | None:
        """A lease of an adapter that is whole in DRAM. Does not block."""
        with self._lock:
            entry = self._entries.get(identity)
        if entry is None:
            return None
        try:
            image = self._shelf.lease(ModelId(identity))
        except ConflictError:  # on its way, or damaged, or gone
            return None
        return self._lease(entry.adapter, image)

    def forget(self, identity: str) -> None:
        """Nobody wants it any more: its bytes go as soon as nobody leases them."""
        with self._lock:
            self._entries.pop(identity, None)
        self._shelf.forget(ModelId(identity))

    def usage(self) -> ArenaUsage:
        return self._zone.usage()

    def where(self, specs: Iterable[AdapterSpec]) -> dict[str, tuple[Tier, int]]:
        """By identity the highest tier that holds all of an adapter's bytes, and how many bytes of
        the arena it takes.
        """
        images, disk = self._shelf.models(), self._origins.disk
        stored = {each.listing.identity for each in disk.checkpoints()} if disk else set()
        found: dict[str, tuple[Tier, int]] = {}
        for spec in specs:
            image = images.get(ModelId(spec.identity))
            if image is not None and image.is_whole:
                tier = Tier.DRAM
            else:
                is_far = self._origins.is_far(spec.source) and spec.identity not in stored
                tier = Tier.REMOTE if is_far else Tier.DISK
            found[spec.identity] = tier, image.num_bytes if image else 0
        return found

    def _stage(self, origin: Origin, adapter: AdapterSnapshot) -> AdapterLease:
        """A lease of an adapter whose bytes are all there by then."""
        image = self._shelf.find(adapter.identity, ModelId(adapter.identity))
        if image is None:
            image = self._claim(origin, adapter)
        lease = self._lease(adapter, image)
        try:
            image.arrival(lambda _: StageReport()).wait()
        except BaseException:
            lease.release()
            raise
        return lease

    def _claim(self, origin: Origin, adapter: AdapterSnapshot) -> Image:
        key = ModelId(adapter.identity)
        files = [origin.file(file.name) for file in adapter.layout.files]
        while True:
            try:
                image, fill = self._shelf.claim(adapter.snapshot, files, key, origin)
                break
            except UnavailableError:
                if not self._evict_oldest():
                    raise
        self._filler.start(Claimant(key, image, origin), fill)
        return image

    def _lease(self, adapter: AdapterSnapshot, image: Image) -> AdapterLease:
        """Of an image that was leased for this; it is now the one that was used last."""
        with self._lock:
            entry = self._entries.get(adapter.identity)
            if entry is None or entry.image is not image:
                entry = self._entries[adapter.identity] = _Entry(adapter, image)
            self._entries.move_to_end(adapter.identity)
            return AdapterLease(self._shelf, entry.image, adapter.identity, entry.layers())

    def _evict_oldest(self) -> bool:
        """Takes the longest unused one out that nobody leases; whether there was one."""
        with self._lock:
            used = {identity: number for number, identity in enumerate(self._entries)}
        for key in sorted(self._shelf.models(), key=lambda key: (used.get(key, -1), key)):
            with contextlib.suppress(ConflictError):
                files = self._shelf.evict(key)
                with self._lock:
                    self._entries.pop(key, None)
                self._filler.wait_left(files)
                return True
        return False

    def _check(self, adapter: AdapterSnapshot, image: Image, base: Origin, layout: Layout) -> None:
        """Looks at all values of a leased adapter, and compares its copies with its base."""

        @contextlib.contextmanager
        def read(tensor: TensorEntry) -> Iterator[memoryview]:
            extent = image.files[tensor.file_index].extent
            with self._zone.memory(extent) as memory, memory[tensor.begin : tensor.end] as data:
                yield data

        def read_base(tensor: TensorEntry) -> Iterator[bytes]:
            file = base.file(layout.files[tensor.file_index].name)
            for index in range(tensor.begin // CHUNK_BYTES, -(-tensor.end // CHUNK_BYTES)):
                start = index * CHUNK_BYTES
                chunk = self._origins.chunk(base, file, index)
                yield chunk[max(0, tensor.begin - start) : tensor.end - start]

        check_values(adapter, read)
        check_copies(adapter, read, layout, read_base)

    def _damaged(self, keys: tuple[ModelId, ...], message: str) -> None:
        _log.error("%s; it is read again when it is needed", message)
        if self.on_damage:
            self.on_damage(keys, message)


class _Entry:
    """An adapter in DRAM, or on its way there."""

    def __init__(self, adapter: AdapterSnapshot, image: Image) -> None:
        self.adapter = adapter
        self.image = image
        self._offsets: tuple[int, ...] = ()
        self._layers: tuple[LoraLayer, ...] = ()

    def layers(self) -> tuple[LoraLayer, ...]:
        """Where its layers are just now; computed anew when the bytes have moved."""
        offsets = tuple(file.extent.offset for file in self.image.files)
        if offsets != self._offsets:
            self._offsets = offsets
            self._layers = tuple(
                LoraLayer(layer.module, layer.scaling, self._slice(layer.a), self._slice(layer.b))
                for layer in self.adapter.layers
            )
        return self._layers

    def _slice(self, tensor: TensorEntry) -> TensorSlice:
        begin = self._offsets[tensor.file_index] + tensor.begin
        return TensorSlice(
            tensor.name, tensor.dtype, tensor.shape, begin, tensor.end - tensor.begin
        )


def _ignore_disk(*_: object) -> None:
    """Where adapters are on disk is asked, not told."""
