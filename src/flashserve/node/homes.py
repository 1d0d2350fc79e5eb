"""Where the models of a worker live: in the arena itself on a processor, else on its device."""

from __future__ import annotations

import dataclasses
import logging
import mmap
import pathlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import nn

from flashserve.engine import gates
from flashserve.engine.gates import Gates
from flashserve.engine.selfcheck import CheckKey, SelfCheck, check_logits
from flashserve.errors import UnsupportedModelError
from flashserve.messages.work import LoadModel
from flashserve.node.arriving import bind_early
from flashserve.node.devicegates import DeviceGates
from flashserve.node.residents import Residents
from flashserve.node.sleepers import Sleepers, kept_bytes
from flashserve.store.checkpoint.order import groups
from flashserve.store.device.bind import TORCH_DTYPES, bind, bind_arriving, unbind
from flashserve.store.device.copier import DeviceCopier
from flashserve.store.device.regions import RegisteredArena
from flashserve.types import ModelId

_log = logging.getLogger(__name__)

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """A model with its weights.

    gates: where an engine waits for those that are still to come; `open` tells them of more bytes
    in the arena. None: all are there.
    """

    model: nn.Module
    gates: Gates | None
    was_asleep: bool


class Home(Protocol):
    """Holds at most one model awake. One that is asleep has its module and none of its bytes."""

    device: torch.device

    @property
    def asleep(self) -> tuple[ModelId, ...]:
        """The models that would wake."""

    def would_wake(self, identity: str, dtype: torch.dtype) -> bool: ...

    def take(self, order: LoadModel, dtype: torch.dtype, build: Callable[[], nn.Module]) -> Taken:
        """Wakes the model of an order, or gives weights to the one that `build` makes.

        Raises:
            DeployError: its tensors do not fit its config.
            UnavailableError, InternalError: the device cannot hold it. Nothing is held then.
        """

    def verify(self) -> None:
        """Compares what the awake model computes with what it computed before.

        Raises:
            SelfCheckError: it differs. The model is gone and would be loaded anew.
        """

    def release(self) -> None:
        """Puts the awake model, if any, to sleep. Nothing may compute with it any more.

        Raises:
            InternalError: the device failed; the model is gone.
        """


class ArenaHome:
    """Models that compute from the arena's own bytes, whose checksums stand: no self-check."""

    def __init__(self, arena: mmap.mmap) -> None:
        self.device = torch.device("cpu")
        self._arena = arena
        self._awake: tuple[LoadModel, torch.dtype, nn.Module] | None = None
        self._asleep: Sleepers[nn.Module] = Sleepers(lambda _: None)

    @property
    def asleep(self) -> tuple[ModelId, ...]:
        return self._asleep.model_ids

    def would_wake(self, identity: str, dtype: torch.dtype) -> bool:
        return _key(identity, dtype) in self._asleep.keys

    def take(self, order: LoadModel, dtype: torch.dtype, build: Callable[[], nn.Module]) -> Taken:
        sleeper = self._asleep.pop(_key(order.identity, dtype))
        model = sleeper if sleeper is not None else build()
        arriving = None
        if order.is_whole:
            bind(model, order.tensors, self._arena, dtype)
        else:
            arriving = bind_early(model, order, self._arena, dtype)
        self._awake = order, dtype, model
        return Taken(model, arriving, sleeper is not None)

    def verify(self) -> None: ...

    def release(self) -> None:
        awake, self._awake = self._awake, None
        if awake is not None:
            order, dtype, model = awake
            unbind(model)
            key = _key(order.identity, dtype)
            if order.identity:
                self._asleep.put(key, model, order.model_id, kept_bytes(model))


class DeviceHome:
    """Models whose bytes are copied to a device.

    Args:
        arena: this process's mapping; `registered` is the same one.
        references: where the self-checks' references are kept; None: there is no check.
    """

    def __init__(
        self,
        copier: DeviceCopier,
        arena: mmap.mmap,
        registered: RegisteredArena,
        references: pathlib.Path | None = None,
    ) -> None:
        self.device = copier.device
        self._arena = arena
        self._references = references
        self._residents = Residents(copier, registered)
        self._awake: tuple[LoadModel, torch.dtype] | None = None

    @property
    def asleep(self) -> tuple[ModelId, ...]:
        return self._residents.asleep_ids

    def would_wake(self, identity: str, dtype: torch.dtype) -> bool:
        return _key(identity, dtype) in self._residents.asleep

    def take(self, order: LoadModel, dtype: torch.dtype, build: Callable[[], nn.Module]) -> Taken:
        if dtype not in _NAMES:
            raise UnsupportedModelError(f"nothing is computed in {dtype}")
        named = groups(tensor.name for tensor in order.tensors)
        num_open = len(named) if order.is_whole else order.num_open
        was_asleep = self.would_wake(order.identity, dtype)
        built: list[nn.Module] = []

        def bound() -> nn.Module:
            built.append(build())
            if order.is_whole:
                bind(built[0], order.tensors, self._arena, None)
            else:
                group_of = {name: index for index, names in enumerate(named) for name in names}
                bind_arriving(built[0], order.tensors, self._arena, None, group_of)
            return built[0]

        resident = self._residents.take(
            _key(order.identity, dtype),
            order.tensors,
            named,
            bound,
            num_open=num_open,
            float_dtype=_NAMES[dtype],
        )
        num_layers = int(resident.model.config.num_hidden_layers)
        waiting = DeviceGates(resident.residence, gates.num_groups(num_layers))
        waiting.open(num_open)
        self._awake = order, dtype
        return Taken(resident.model, waiting, was_asleep and not built)

    def verify(self) -> None:
        if self._awake is None or self._references is None or not self._awake[0].identity:
            return
        order, dtype = self._awake
        check = SelfCheck(self._references, CheckKey.of(order.identity, self.device, dtype))
        try:
            self._residents.verify(check, lambda model: check_logits(model, self.device))
        except (OSError, torch.OutOfMemoryError) as error:
            _log.warning("the self-check of %s could not be made: %s", order.model_id, error)

    def release(self) -> None:
        awake, self._awake = self._awake, None
        if awake is not None and awake[0].identity:
            self._residents.sleep(awake[0].model_id)
        else:
            self._residents.drop()

    def close(self) -> None:
        """Gives everything on the device back, sleeping models too."""
        self._awake = None
        self._residents.close()


def _key(identity: str, dtype: torch.dtype) -> str:
    return f"{dtype} {identity}"
