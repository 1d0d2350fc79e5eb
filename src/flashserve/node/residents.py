"""What a worker's device holds: one model awake, or the last one asleep."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from flashserve.engine.selfcheck import SelfCheck
from flashserve.errors import ConflictError, FlashServeError, SelfCheckError
from flashserve.node.sleeping import Residence, ResidenceState
from flashserve.store.device.copier import DeviceCopier
from flashserve.store.device.regions import RegisteredArena
from flashserve.types import TensorSlice

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Resident:
    """A model on the device. The same object comes back when it wakes.

    key: of the bytes and of how they are computed with; equal keys are the same model.
    """

    key: str
    model: nn.Module
    residence: Residence


class Residents:
    """Loads a model, or wakes it when it is the one that slept here last."""

    def __init__(self, copier: DeviceCopier, arena: RegisteredArena) -> None:
        self._copier = copier
        self._arena = arena
        self._last: Resident | None = None

    @property
    def asleep(self) -> str | None:
        """The key of the model that would wake."""
        last = self._last
        is_asleep = last is not None and last.residence.state is ResidenceState.ASLEEP
        return last.key if last is not None and is_asleep else None

    def take(
        self,
        key: str,
        tensors: Sequence[TensorSlice],
        groups: Sequence[Sequence[str]],
        build: Callable[[], nn.Module],
        *,
        num_open: int = 0,
        float_dtype: str | None = None,
    ) -> Resident:
        """The model awake; bring the groups that are not yet open with `Residence.open`.

        A model that cannot wake is loaded anew; another one that slept here is closed before, so
        that its memory is free.

        Args:
            build: makes the module, bound to the arena; not called for one that wakes.
            num_open: so many groups lie in the arena; their copies run while the module is made.

        Raises:
            ConflictError: a model is awake already.
            UnavailableError: the device has not enough memory; it holds nothing then.
        """
        if self._last is not None and self._last.residence.state is ResidenceState.AWAKE:
            raise ConflictError("the device holds a model already")
        if self.asleep != key or not self._wake(tensors):
            self.close()
            residence = Residence(
                self._copier, self._arena, tensors, groups, float_dtype=float_dtype
            )
            residence.open(num_open)
            try:
                model = build()
            except BaseException:
                residence.close()
                raise
            residence.bind(model)
            self._last = Resident(key, model, residence)
        assert self._last is not None
        self._last.residence.open(num_open)
        return self._last

    def awake(self) -> Resident:
        """The model that is on the device now.

        Raises:
            ConflictError: none is.
        """
        last = self._last
        if last is None or last.residence.state is not ResidenceState.AWAKE:
            raise ConflictError("no model is awake on the device")
        return last

    def sleep(self) -> int:
        """Puts the awake model to sleep; how many bytes of the device that freed."""
        last = self._last
        if last is None or last.residence.state is not ResidenceState.AWAKE:
            return 0
        return last.residence.sleep()

    def verify(self, check: SelfCheck, logits: Callable[[nn.Module], torch.Tensor]) -> bool:
        """Compares what the awake model computes with its reference; records the first of a key.

        For a load from DRAM, whose bytes have checksums, call it after the first token.

        Returns:
            Whether there was a reference.

        Raises:
            SelfCheckError: it computes something else. It is closed: the next `take` loads it anew.
        """
        last = self.awake()
        last.residence.wait(last.residence.num_groups - 1)
        try:
            return check.compare(logits(last.model))
        except SelfCheckError:
            self.close()
            raise

    def close(self) -> None:
        """Gives everything on the device back."""
        last, self._last = self._last, None
        if last is not None:
            last.residence.close()

    def _wake(self, tensors: Sequence[TensorSlice]) -> bool:
        assert self._last is not None
        try:
            self._last.residence.wake(tensors)
        except FlashServeError as error:
            _log.warning("a sleeping model is loaded anew: %s", error)
            return False
        return True
