"""Which adapters are in the device's memory: loaded ahead, pinned while in use, evicted by age.

An adapter is known from `put` to `drop`: its bytes lie in the arena for so long. One that is
resident has its own copy in pages, which outlives a drop, unless the bytes were damaged. Pages of
pinned adapters are never touched; of the others, those used least recently give way.

The engine's thread pins and unpins. `put`, `check`, `want` and `prefetch` may come from another
one, also during a step, and a load copies without keeping anyone from the bookkeeping.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable

from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.targets import Targets
from flashserve.errors import FlashServeError, InputError, UnavailableError, UnsupportedModelError
from flashserve.messages.work import AdapterImage
from flashserve.types import AdapterId


@dataclasses.dataclass(slots=True)
class _Resident:
    placed: Placed
    num_pins: int = 0
    is_loading: bool = True
    is_damaged: bool = False
    """Leaves with its last pin, and gets no further one."""


class AdapterCache:
    """The adapters of one engine.

    Args:
        make_memory: takes the device's memory; called for the first adapter that is used.
        max_rank: of any layer of an adapter.
    """

    def __init__(
        self,
        targets: Targets,
        make_memory: Callable[[], AdapterMemory],
        max_rank: int,
    ) -> None:
        self._targets = targets
        self._make_memory = make_memory
        self._max_rank = max_rank
        self._memory: AdapterMemory | None = None
        self._known: dict[AdapterId, AdapterImage] = {}
        self._refused: dict[AdapterId, FlashServeError] = {}
        self._resident: collections.OrderedDict[AdapterId, _Resident] = collections.OrderedDict()
        self._wanted: collections.Counter[AdapterId] = collections.Counter()
        self._damaged: set[AdapterId] = set()
        self._changed = threading.Condition()
        self.counts: collections.Counter[str] = collections.Counter()
        """Since the start: loads, evictions, and pins of adapters that were resident (hits)."""

    def put(self, image: AdapterImage) -> None:
        """Makes an adapter known. One that does not fit the model is refused when it is used."""
        error: FlashServeError | None = None
        try:
            self._check_image(image)
        except FlashServeError as found:
            error = found
        with self._changed:
            self._known[image.adapter_id] = image
            self._refused.pop(image.adapter_id, None)
            if error is not None:
                self._refused[image.adapter_id] = error

    def drop(self, adapter_id: AdapterId, *, is_damaged: bool = False) -> None:
        """The adapter's bytes in the arena may go; waits for a load that still reads them.

        Args:
            is_damaged: its pages go too, those that are pinned when they are no more.
        """
        with self._changed:
            self._changed.wait_for(lambda: not self._is_loading(adapter_id))
            self._known.pop(adapter_id, None)
            self._refused.pop(adapter_id, None)
            if is_damaged:
                self._damaged.add(adapter_id)
                if (found := self._resident.get(adapter_id)) is not None:
                    found.is_damaged = True
                    self._evict_damaged(adapter_id, found)

    def take_damaged(self) -> set[AdapterId]:
        """The adapters that were dropped as damaged since the last call."""
        with self._changed:
            damaged, self._damaged = self._damaged, set()
            return damaged

    def check(self, adapter_id: AdapterId) -> None:
        """Raises:
        InputError: the adapter is not known.
        DeployError: it does not fit the model.
        UnavailableError: it never fits the memory, or the device has none.
        """
        with self._changed:
            if error := self._refused.get(adapter_id):
                raise type(error)(error.message)
            if (found := self._resident.get(adapter_id)) is not None and not found.is_damaged:
                return
            if (image := self._known.get(adapter_id)) is None:
                raise InputError(f"the replica was not told of adapter {adapter_id}")
            memory = self._memory = self._memory or self._make_memory()
        if memory.num_pages(image) > memory.pages.num_pages:
            raise UnavailableError(
                f"adapter {adapter_id} takes {memory.num_pages(image) * memory.page_bytes} bytes "
                f"of {memory.pages.num_pages * memory.page_bytes}; raise engine.adapter_bytes"
            )

    def want(self, adapter_id: AdapterId) -> None:
        """A sequence is to use the adapter; `unwant` once it is gone."""
        with self._changed:
            self._wanted[adapter_id] += 1

    def prefetch(self, adapter_id: AdapterId) -> None:
        """Loads the adapter ahead of its use, if only those that nobody wants must give way.

        One that is there is now the one that was used last.
        """
        with self._changed:
            if adapter_id in self._resident:
                self._resident.move_to_end(adapter_id)
                return
        if (load := self._begin(adapter_id, spare_wanted=True)) is not None:
            self._load(*load)

    def unwant(self, adapter_id: AdapterId) -> None:
        with self._changed:
            self._wanted[adapter_id] -= 1
            if not self._wanted[adapter_id]:
                del self._wanted[adapter_id]

    def pin(self, adapter_id: AdapterId, *, may_load: bool) -> bool:
        """Keeps the adapter in memory; false if it is not there and cannot be now.

        Args:
            may_load: take room for it, from adapters without pins if need be.
        """
        load = self._begin(adapter_id, spare_wanted=False) if may_load else None
        if load is not None and not self._load(*load):
            return False
        with self._changed:
            found = self._resident.get(adapter_id)
            if found is None or found.is_loading or found.is_damaged:
                return False
            self._resident.move_to_end(adapter_id)
            found.num_pins += 1
            self.counts["hits"] += load is None
            return True

    def unpin(self, adapter_id: AdapterId) -> None:
        with self._changed:
            found = self._resident[adapter_id]
            assert found.num_pins > 0
            found.num_pins -= 1
            self._evict_damaged(adapter_id, found)

    def placed(self, adapter_id: AdapterId) -> Placed:
        """Where a pinned adapter is."""
        found = self._resident[adapter_id]
        assert found.num_pins > 0
        return found.placed

    def failure(self, adapter_id: AdapterId) -> FlashServeError | None:
        """Why sequences of this adapter, which is not resident, cannot go on, if they cannot."""
        with self._changed:
            if adapter_id in self._resident:
                return None
            if error := self._refused.get(adapter_id):
                return type(error)(error.message)
            if adapter_id not in self._known:
                return InputError(
                    f"adapter {adapter_id} was dropped while a sequence waited for it"
                )
            return None

    def wait_for_loads(self) -> None:
        """Returns once no load is under way in another thread."""
        with self._changed:
            self._changed.wait_for(
                lambda: not any(item.is_loading for item in self._resident.values())
            )

    @property
    def resident(self) -> tuple[AdapterId, ...]:
        """Least recently used first."""
        with self._changed:
            return tuple(self._resident)

    @property
    def memory(self) -> AdapterMemory | None:
        return self._memory

    def _check_image(self, image: AdapterImage) -> None:
        self._targets.check(image)
        for layer in image.layers:
            if layer.a.shape[0] > self._max_rank:
                raise UnsupportedModelError(
                    f"adapter {image.adapter_id}: {layer.module} has rank {layer.a.shape[0]}, and "
                    f"engine.max_lora_rank is {self._max_rank}"
                )

    def _is_loading(self, adapter_id: AdapterId) -> bool:
        found = self._resident.get(adapter_id)
        return found is not None and found.is_loading

    def _begin(
        self, adapter_id: AdapterId, *, spare_wanted: bool
    ) -> tuple[AdapterImage, Placed] | None:
        """Finds room for an adapter; None if it is there, under way, not here, or there is none."""
        with self._changed:
            image = self._known.get(adapter_id)
            if image is None or adapter_id in self._resident or adapter_id in self._refused:
                return None
            if self._memory is None:
                return None
            placed = self._place(self._memory, image, spare_wanted=spare_wanted)
            if placed is None:
                return None
            self._resident[adapter_id] = _Resident(placed)
            return image, placed

    def _place(
        self, memory: AdapterMemory, image: AdapterImage, *, spare_wanted: bool
    ) -> Placed | None:
        idle = [key for key, item in self._resident.items() if self._is_idle(item)]
        if spare_wanted:
            idle = [key for key in idle if key not in self._wanted]
        idle.sort(key=self._wanted.__contains__)  # stable: by age among equals
        room = sum(self._resident[key].placed.num_pages for key in idle)
        if memory.num_pages(image) > memory.pages.num_free + room:
            return None
        while (placed := memory.place(image)) is None and idle:
            self._evict(memory, idle.pop(0))
        return placed

    def _is_idle(self, item: _Resident) -> bool:
        return item.num_pins == 0 and not item.is_loading

    def _evict(self, memory: AdapterMemory, adapter_id: AdapterId) -> None:
        gone = self._resident.pop(adapter_id)
        memory.release(gone.placed)
        self.counts["evictions"] += 1

    def _evict_damaged(self, adapter_id: AdapterId, item: _Resident) -> None:
        if item.is_damaged and not item.num_pins:
            assert self._memory is not None
            self._evict(self._memory, adapter_id)

    def _load(self, image: AdapterImage, placed: Placed) -> bool:
        """Copies the bytes; false if that failed, which its sequences hear from `failure`."""
        memory = self._memory
        assert memory is not None
        error: FlashServeError | None = None
        try:
            memory.fill(placed, image)
        except FlashServeError as found:
            error = found
        except Exception as found:
            error = UnavailableError(f"adapter {image.adapter_id} could not be loaded: {found}")
        with self._changed:
            if error is None:
                self._resident[image.adapter_id].is_loading = False
                self.counts["loads"] += 1
            else:
                self._refused[image.adapter_id] = error
                del self._resident[image.adapter_id]
                memory.release(placed)
            self._changed.notify_all()
        return error is None
