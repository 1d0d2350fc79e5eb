"""The models that a worker keeps without their weights, so that they need not be built again."""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Generic, TypeVar

from torch import nn

from flashserve.types import ModelId

T = TypeVar("T")

MAX_ASLEEP = 8
MAX_BYTES = 256 << 20
_MODULE_BYTES = 3 << 10
"""Of Python objects for each module and its parameters; measured with Llama and rounded up."""


def kept_bytes(model: nn.Module) -> int:
    """Roughly the memory that `model` takes without its weights: its objects and its buffers."""
    num_modules = sum(1 for _ in model.modules())
    buffers = {id(buffer): buffer for buffer in model.buffers() if not buffer.is_meta}
    num_bytes = sum(int(buffer.nbytes) for buffer in buffers.values())
    return num_modules * _MODULE_BYTES + num_bytes


class Sleepers(Generic[T]):
    """Sleeping models by key, the longest asleep first; those go when there are too many.

    Invariant: at most max_asleep of them, of at most max_bytes together.

    Args:
        close: called with each that goes.
    """

    def __init__(
        self,
        close: Callable[[T], None],
        *,
        max_asleep: int = MAX_ASLEEP,
        max_bytes: int = MAX_BYTES,
    ) -> None:
        self._close = close
        self._max_asleep = max_asleep
        self._max_bytes = max_bytes
        self._asleep: collections.OrderedDict[str, tuple[T, ModelId, int]]
        self._asleep = collections.OrderedDict()

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self._asleep)

    @property
    def model_ids(self) -> tuple[ModelId, ...]:
        """What they were called when they went to sleep."""
        return tuple(model_id for _, model_id, _ in self._asleep.values())

    def put(self, key: str, sleeper: T, model_id: ModelId, num_bytes: int) -> None:
        """Takes one that is not among them; it goes at once when it alone is too large."""
        assert key not in self._asleep
        if num_bytes > self._max_bytes:
            self._close(sleeper)
            return
        self._asleep[key] = sleeper, model_id, num_bytes
        while len(self._asleep) > self._max_asleep or self._num_bytes > self._max_bytes:
            _, (oldest, _, _) = self._asleep.popitem(last=False)
            self._close(oldest)

    def pop(self, key: str) -> T | None:
        """The one of that key, which is the caller's from now on."""
        found = self._asleep.pop(key, None)
        return found[0] if found is not None else None

    def clear(self) -> None:
        while self._asleep:
            _, (sleeper, _, _) = self._asleep.popitem()
            self._close(sleeper)

    @property
    def _num_bytes(self) -> int:
        return sum(num_bytes for _, _, num_bytes in self._asleep.values())
