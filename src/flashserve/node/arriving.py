"""The worker's side of a model that is loaded while its bytes are still on their way."""

from __future__ import annotations

import logging
import mmap

import torch
from torch import nn

from flashserve.engine import gates
from flashserve.engine.gates import Gates
from flashserve.errors import FlashServeError, InternalError
from flashserve.messages.work import LoadModel
from flashserve.store.checkpoint import order
from flashserve.store.device.bind import Pending, bind_arriving

_log = logging.getLogger(__name__)


class Arriving:
    """Opens the gates of an engine as the groups of a checkpoint's tensors come in.

    `opened` and `fail` are called on the receiving thread, while a step may wait at the gates.
    """

    def __init__(
        self, load: LoadModel, pending: Pending, gates: Gates, *, has_same_groups: bool
    ) -> None:
        """Args: has_same_groups: the checkpoint's groups are those that the engine waits for."""
        self.model_id = load.model_id
        self.gates = gates
        self._pending = pending
        self._num_arriving = load.num_groups
        self._has_same_groups = has_same_groups

    def opened(self, num_open: int) -> None:
        """The bytes of groups [0, num_open) are there: copies what is copied, then lets it be used.

        Where the checkpoint is not divided as the engine is, all must be there first. The bytes of
        the last groups may come with those of an earlier one, which is then the last to be told.
        """
        if num_open >= self._num_arriving:
            num_open = self.gates.num_groups
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
        self.gates.open(num_open)

    def fail(self, error: FlashServeError) -> None:
        """The rest will not come, or nobody wants it any more."""
        self.gates.fail(error)


def bind_early(model: nn.Module, load: LoadModel, arena: mmap.mmap, dtype: torch.dtype) -> Arriving:
    """Binds a model to bytes of which the groups [0, load.num_open) are there.

    Raises:
        DeployError: its tensors do not fit its config.
    """
    named = order.groups(tensor.name for tensor in load.tensors)
    group_of = {name: group for group, names in enumerate(named) for name in names}
    waiting = Gates(gates.num_groups(int(model.config.num_hidden_layers)))
    is_same = len(named) == waiting.num_groups
    if not is_same:
        group_of = dict.fromkeys(group_of, 0)
    pending = bind_arriving(model, load.tensors, arena, dtype, group_of)
    arriving = Arriving(load, pending, waiting, has_same_groups=is_same)
    arriving.opened(load.num_open)
    return arriving
