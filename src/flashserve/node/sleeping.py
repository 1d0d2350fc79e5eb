"""A model's life on a device: loading, awake, asleep, awake again, gone.

A sleeping model has given its device memory back and kept everything else: its module, its
addresses where the device can keep them, and so its graphs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from flashserve.errors import InternalError, UnsupportedModelError
from flashserve.store.device.bind import TORCH_DTYPES
from flashserve.store.device.copier import DeviceCopier, Event
from flashserve.store.device.loadplan import Copy, Placement, lay_out, plan_copies
from flashserve.store.device.regions import RegisteredArena
from flashserve.store.device.slices import Part
from flashserve.types import TensorSlice


class ResidenceState(enum.Enum):
    AWAKE = "awake"
    ASLEEP = "asleep"
    CLOSED = "closed"


class Residence:
    """One model's weights on a device, in one region.

    Made awake and empty: `open` brings the bytes, group by group in the order in which they
    reached the arena. When anything fails, nothing stays allocated and it is closed.

    Args:
        groups: tensor names in execution order; each tensor in exactly one.
        float_dtype: the safetensors name of the dtype that is computed in; None keeps each.
        parts: what this rank needs of a tensor; the whole of one that is not named.
    """

    def __init__(
        self,
        copier: DeviceCopier,
        arena: RegisteredArena,
        tensors: Sequence[TensorSlice],
        groups: Sequence[Sequence[str]],
        *,
        float_dtype: str | None = None,
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        self._copier = copier
        self._arena = arena
        self._layout = lay_out(tensors, groups, parts=parts, float_dtype=float_dtype)
        self._copies = self._plan(tensors)
        self._events: list[Event] = []
        self._region = copier.reserve(self._layout.num_bytes)
        self._state = ResidenceState.ASLEEP
        self._map()

    @property
    def state(self) -> ResidenceState:
        return self._state

    @property
    def num_bytes(self) -> int:
        """Of device memory, while awake."""
        return self._region.num_bytes

    @property
    def keeps_addresses(self) -> bool:
        """Whether graphs that were captured before a sleep hold after it."""
        return self._region.keeps_address

    @property
    def num_groups(self) -> int:
        return len(self._layout.groups)

    def bind(self, model: nn.Module) -> None:
        """Points the parameters of `model` at the region; their values come with the groups.

        Args:
            model: already bound to the arena by `store.device.bind` with dtype None, which ties
                what is tied and computes buffers that no checkpoint holds; those move along.

        Raises:
            UnsupportedModelError: a parameter is none of the placed tensors.
        """
        with self._closing_on_error():
            views = self.views()
            placed: set[int] = set()
            parameters = list(model.named_parameters(remove_duplicate=False))
            for name, parameter in parameters:
                if name in views and id(parameter) not in placed:
                    parameter.data = views[name]
                    placed.add(id(parameter))
            for name, parameter in parameters:
                if id(parameter) not in placed:
                    raise UnsupportedModelError(f"parameter {name} has no place on the device")
            for path, module in model.named_modules():
                for name, buffer in module.named_buffers(recurse=False):
                    view = views.get(f"{path}.{name}" if path else name)
                    setattr(module, name, buffer.to(self._copier.device) if view is None else view)

    def views(self) -> dict[str, torch.Tensor]:
        """The region's tensors by name, while it is awake."""
        self._require(ResidenceState.AWAKE)
        return {
            place.name: self._view(place.offset, place.num_bytes, place.dtype, place.shape)
            for group in self._layout.groups
            for place in group
        }

    def open(self, num_open: int) -> None:
        """The first `num_open` groups lie in the arena: starts those that have not been started.

        Returns at once on CUDA. From one thread at a time.

        Raises:
            InternalError: a copy was refused; the residence is closed.
        """
        self._require(ResidenceState.AWAKE)
        with self._closing_on_error():
            for index in range(len(self._events), num_open):
                self._copier.copy(self._arena.address, self._region, self._copies[index])
                for place in self._layout.groups[index]:
                    if place.staged_at is not None:
                        self._convert(place, place.staged_at)
                self._events.append(self._copier.record())

    def wait(self, group: int) -> None:
        """What this thread gives the device from now on finds the group's weights in place.

        Raises:
            InternalError: the group has not been opened, or the residence is not awake.
        """
        self._require(ResidenceState.AWAKE)
        if group >= len(self._events):
            raise InternalError(f"group {group} of the weights was waited for before it was opened")
        self._events[group].wait()

    def load(self) -> None:
        """Starts every group: all bytes lie in the arena."""
        self.open(self.num_groups)

    def finish(self) -> None:
        """Returns when every opened group has arrived: the arena's bytes may then go."""
        self._require(ResidenceState.AWAKE)
        if self._events:
            self._events[-1].synchronize()

    def sleep(self) -> int:
        """Gives the region's memory back; how many bytes. Nothing may compute with it now."""
        self._require(ResidenceState.AWAKE)
        with self._closing_on_error():
            self._copier.synchronize()
            self._region.unmap()
        self._events.clear()
        self._state = ResidenceState.ASLEEP
        return self.num_bytes

    def wake(self, tensors: Sequence[TensorSlice]) -> None:
        """Takes memory again; bring the bytes with `open` or `load`.

        Args:
            tensors: where the same tensors lie in the arena now.

        Raises:
            CheckpointError: they are other tensors.
            UnavailableError: the device has not enough memory. Closed in either case.
        """
        self._require(ResidenceState.ASLEEP)
        with self._closing_on_error():
            self._copies = self._plan(tensors)
        self._map()

    def close(self) -> None:
        """Gives everything back, after the copies under way; more than once does no harm."""
        if self._state is ResidenceState.CLOSED:
            return
        self._state = ResidenceState.CLOSED
        self._events.clear()
        try:
            self._copier.synchronize()
        finally:
            self._region.free()

    def _plan(self, tensors: Sequence[TensorSlice]) -> tuple[tuple[Copy, ...], ...]:
        return plan_copies(self._layout, tensors, self._arena.num_bytes, self._arena.boundaries)

    def _map(self) -> None:
        with self._closing_on_error():
            self._region.map()
        self._state = ResidenceState.AWAKE

    def _convert(self, place: Placement, staged_at: int) -> None:
        raw = self._view(staged_at, place.part.num_bytes, place.stored, place.shape)
        target = self._view(place.offset, place.num_bytes, place.dtype, place.shape)
        self._copier.convert(raw, target)

    def _view(
        self, offset: int, num_bytes: int, dtype: str, shape: tuple[int, ...]
    ) -> torch.Tensor:
        if dtype not in TORCH_DTYPES:
            raise UnsupportedModelError(f"weights of type {dtype} are not computed with")
        return self._region.bytes[offset : offset + num_bytes].view(TORCH_DTYPES[dtype]).view(shape)

    def _require(self, wanted: ResidenceState) -> None:
        if self._state is not wanted:
            raise InternalError(f"the model on the device is {self._state.value}")

    def _closing_on_error(self) -> _Closing:
        return _Closing(self)


class _Closing:
    """Closes a residence when the block under it raises."""

    def __init__(self, residence: Residence) -> None:
        self._residence = residence

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        if error is not None:
            self._residence.close()
