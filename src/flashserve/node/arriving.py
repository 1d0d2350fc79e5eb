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
from flashserve.store import order
from flashserve.store.device import Pending, bind_arriving
from flashserve.types import ModelId

_log = logging.getLogger(__name__)


class Arriving:
    """Opens the gates of an engine as the groups of a checkpoint's tensors come in.

    `opened` and `fail` are called on the receiving thread, while a step may wait at the gates.
    """

    def __init__(self, model_id: ModelId, pending: Pending, num_groups: int, gates: Gates) -> None:
        """Args: num_groups: of the checkpoint's tensors, as store/order.py divides them."""
        self.model_id = model_id
        self.gates = gates
        self._pending = pending
        self._num_groups = num_groups

    def opened(self, num_open: int) -> None:
        """The bytes of groups [0, num_open) are there: copies what is copied, then lets it be used.

        Where the checkpoint is not divided as the engine is, all must be there first.
        """
        try:
            self._pending.fill(num_open)
        except Exception as error:
            _log.exception("weights that had arrived could not be copied")
            self.fail(
                InternalError(f"weights could not be copied: {type(error).__name__}: {error}")
            )
            return
        if num_open >= self._num_groups:
            self.gates.open(self.gates.num_groups)
        elif self._num_groups == self.gates.num_groups:
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
    pending = bind_arriving(model, load.tensors, arena, dtype, group_of)
    num_layers: int = model.config.num_hidden_layers
    arriving = Arriving(load.model_id, pending, len(named), Gates(gates.num_groups(num_layers)))
    arriving.opened(load.num_open)
    return arriving
