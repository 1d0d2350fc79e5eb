"""The worker's side of a model that is loaded while its bytes are still on their way."""

from __future__ import annotations

import logging
import mmap

import torch
from torch import nn

from flashserve.engine import gates
from flashserve.engine.gates import Gates
from flashserve.errors import InternalError
from flashserve.messages.work import LoadModel
from flashserve.store.checkpoint import order
from flashserve.store.device.bind import Pending, bind_arriving

_log = logging.getLogger(__name__)


class ArrivingGates(Gates):
    """Gates of an engine that computes from the arena, where the weights are still coming in.

    `open` and `fail` are called on the receiving thread, while a step may wait.
    """

    def __init__(
        self, num_groups: int, pending: Pending, num_arriving: int, *, has_same_groups: bool
    ) -> None:
        """Args:
        num_groups: as the engine counts them.
        pending: the copies of what is not computed with in place.
        num_arriving: the checkpoint's groups.
        has_same_groups: they are those that the engine waits for.
        """
        super().__init__(num_groups)
        self._pending = pending
        self._num_arriving = num_arriving
        self._has_same_groups = has_same_groups

    def open(self, num_open: int) -> None:
        """The bytes of groups [0, num_open) are there: copies what is copied, then lets it be used.

        Where the checkpoint is not divided as the engine is, all must be there first. The bytes of
        the last groups may come with those of an earlier one, which is then the last to be told.
        """
        if num_open >= self._num_arriving:
            num_open = self.num_groups
        elif not self._has_same_groups:
            return
        try:
            self._pending.fill(num_open)
        except Exception as error:
            _log.exception("weights that had arrived could not be copied")
            self.fail(
                InternalError(f"weights could not be copied: {type(error).__name__}: {error}")
            )
            return
        super().open(num_open)


def bind_early(
    model: nn.Module, load: LoadModel, arena: mmap.mmap, dtype: torch.dtype
) -> ArrivingGates:
    """Binds a model to bytes of which the groups [0, load.num_open) are there.

    Raises:
        DeployError: its tensors do not fit its config.
    """
    named = order.groups(tensor.name for tensor in load.tensors)
    group_of = {name: group for group, names in enumerate(named) for name in names}
    num_groups = gates.num_groups(int(model.config.num_hidden_layers))
    is_same = len(named) == num_groups
    if not is_same:
        group_of = dict.fromkeys(group_of, 0)
    pending = bind_arriving(model, load.tensors, arena, dtype, group_of)
    arriving = ArrivingGates(num_groups, pending, load.num_groups, has_same_groups=is_same)
    arriving.open(load.num_open)
    return arriving
