"""What spare workers are told to prepare for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from flashserve.messages.work import Prepare
from flashserve.node.workers import Worker
from flashserve.types import ModelId


class Hints:
    """One hint for each model in DRAM; each worker is sent each of them once."""

    def __init__(self) -> None:
        self._hints: dict[ModelId, Prepare] = {}

    def add(self, model_id: ModelId, hint: Prepare, spare: Iterable[Worker]) -> None:
        """Spare workers prepare for the model now; the others when they are spare again."""
        self._hints[model_id] = hint
        for worker in spare:
            _send(worker, model_id, hint)

    def send_all(self, worker: Worker) -> None:
        for model_id, hint in self._hints.items():
            _send(worker, model_id, hint)

    def forget(self, model_id: ModelId, workers: Iterable[Worker]) -> None:
        """The model has left DRAM."""
        if hint := self._hints.pop(model_id, None):
            for worker in workers:
                worker.hinted.discard(_key(model_id, hint))


def _send(worker: Worker, model_id: ModelId, hint: Prepare) -> None:
    key = _key(model_id, hint)
    if key not in worker.hinted:
        worker.hinted.add(key)
        worker.channel.notify("prepare", hint)


def _key(model_id: ModelId, hint: Prepare) -> Hashable:
    return model_id, hint.extents
