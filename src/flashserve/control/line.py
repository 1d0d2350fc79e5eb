"""The line of models that want a slot: first come, first served."""

from __future__ import annotations

from collections import OrderedDict

from flashserve.control.records import Model
from flashserve.control.timers import Timer, TimerKind, Timers
from flashserve.types import ModelId, NodeId


class Line:
    """Models with waiting requests and no replica that would serve them."""

    def __init__(self, timers: Timers, patience_s: float) -> None:
        self.models: OrderedDict[ModelId, Model] = OrderedDict()
        self.lapsed: list[Model] = []
        """Models that have left the line and still claim room on a node; see slots.py."""
        self.shunning: dict[ModelId, Model] = {}
        self._timers = timers
        self._patience_s = patience_s
        self._num_joined = 0

    def review(self, model: Model) -> None:
        """Put the model into the line, or take it out, as its state demands."""
        wants, stands = model.is_wanting, model.model_id in self.models
        if wants and not stands:
            self._join(model)
        elif stands and not wants:
            del self.models[model.model_id]
            if model.claim is not None:
                self.lapsed.append(model)

    def _join(self, model: Model) -> None:
        first = next(iter(model.waiting.values()))
        self._num_joined += 1
        self.models[model.model_id] = model
        model.place_in_line = self._num_joined
        if first.attempts or model.memory_failures:
            # It had its turn and lost it by no fault of its requests.
            self.models.move_to_end(model.model_id, last=False)
            model.place_in_line = -self._num_joined
        self.set_patience(model, first.waiting_since + self._patience_s)

    def set_patience(self, model: Model, when: float) -> None:
        model.patience_at = when
        self._timers.schedule(Timer(TimerKind.PATIENCE, model.model_id), when)

    def shun(self, model: Model, node_id: NodeId, retry_at: float) -> None:
        """Start the model elsewhere, until something changes or `retry_at`."""
        model.shunned[node_id] = None
        model.retry_at = retry_at
        self.shunning[model.model_id] = model
        self._timers.schedule(Timer(TimerKind.RETRY, model.model_id), retry_at)

    def end_shunning(self, model: Model) -> None:
        model.shunned.clear()
        self.shunning.pop(model.model_id, None)

    def clear_shunned(self) -> None:
        """Something has changed: every node is worth another try."""
        for model in self.shunning.values():
            model.shunned.clear()
        self.shunning.clear()
