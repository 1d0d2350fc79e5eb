"""What a worker's device holds: at most one model awake, and those that sleep."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from flashserve.engine.selfcheck import SelfCheck
from flashserve.errors import ConflictError, FlashServeError, SelfCheckError
from flashserve.node.sleepers import MAX_ASLEEP, Sleepers, kept_bytes
from flashserve.node.sleeping import Residence, ResidenceState
from flashserve.store.device.copier import DeviceCopier
from flashserve.store.device.regions import RegisteredArena
from flashserve.types import ModelId, TensorSlice

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
    """Loads a model, or wakes it when it sleeps here.

    Args:
        max_asleep: so many sleep at most; those that slept longest are closed.
    """

    def __init__(
        self, copier: DeviceCopier, arena: RegisteredArena, max_asleep: int = MAX_ASLEEP
    ) -> None:
        self._copier = copier
        self._arena = arena
        self._awake: Resident | None = None
        self._asleep: Sleepers[Resident] = Sleepers(_close, max_asleep=max_asleep)

    @property
    def asleep(self) -> tuple[str, ...]:
        """The keys of the models that would wake."""
        return self._asleep.keys

    @property
    def asleep_ids(self) -> tuple[ModelId, ...]:
        return self._asleep.model_ids

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

        A model that cannot wake is loaded anew.

        Args:
            build: makes the module, bound to the arena; not called for one that wakes.
            num_open: so many groups lie in the arena; their copies run while the module is made.

        Raises:
            ConflictError: a model is awake already.
            UnavailableError: the device has not enough memory; it holds nothing of it then.
            InternalError: a copy was refused; likewise.
        """
        if self._is_awake:
            raise ConflictError("the device holds a model already")
        sleeper = self._asleep.pop(key)
        if sleeper is None or not _wake(sleeper, tensors):
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
            sleeper = Resident(key, model, residence)
        sleeper.residence.open(num_open)
        self._awake = sleeper
        return sleeper

    def awake(self) -> Resident:
        """The model that is on the device now.

        Raises:
            ConflictError: none is.
        """
        if self._awake is None or not self._is_awake:
            raise ConflictError("no model is awake on the device")
        return self._awake

    def sleep(self, model_id: ModelId = ModelId("")) -> int:  # noqa: B008 - a string
        """Puts the awake model to sleep; how many bytes of the device that freed.

        Args:
            model_id: what `asleep_ids` is to call it.
        """
        awake, is_awake = self._awake, self._is_awake
        self._awake = None
        if awake is None or not is_awake:
            return 0
        num_bytes = awake.residence.sleep()
        self._asleep.put(awake.key, awake, model_id, kept_bytes(awake.model))
        return num_bytes

    def verify(self, check: SelfCheck, logits: Callable[[nn.Module], torch.Tensor]) -> bool:
        """Compares what the awake model computes with its reference; records the first of a key.

        For a load from DRAM, whose bytes have checksums, call it after the first token.

        Returns:
            Whether there was a reference.

        Raises:
            SelfCheckError: it computes something else. It is closed: the next `take` loads it anew.
        """
        awake = self.awake()
        awake.residence.wait(awake.residence.num_groups - 1)
        try:
            return check.compare(logits(awake.model))
        except SelfCheckError:
            self.drop()
            raise

    def drop(self) -> None:
        """Closes the awake model, if any: it does not sleep."""
        awake, self._awake = self._awake, None
        if awake is not None:
            _close(awake)

    def close(self) -> None:
        """Gives everything on the device back."""
        self.drop()
        self._asleep.clear()

    @property
    def _is_awake(self) -> bool:
        awake = self._awake
        return awake is not None and awake.residence.state is ResidenceState.AWAKE


def _wake(sleeper: Resident, tensors: Sequence[TensorSlice]) -> bool:
    try:
        sleeper.residence.wake(tensors)
    except FlashServeError as error:
        _log.warning("a sleeping model is loaded anew: %s", error)
        return False
    return True


def _close(resident: Resident) -> None:
    resident.residence.close()
