"""The workers of a modelled node: who waits for one, and what sleeps in them (see node/pool.py)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import msgspec

from flashserve.types import ModelId


@dataclasses.dataclass(slots=True, eq=False)
class Worker:
    """asleep: models that it would wake, longest asleep first."""

    last_model: ModelId | None = None
    asleep: collections.OrderedDict[ModelId, str] = dataclasses.field(
        default_factory=collections.OrderedDict
    )
    """With the source of each: a model deployed anew from another one does not wake."""


class Claim(msgspec.Struct, eq=False):
    """Answered once, in order; `worker` is None until then."""

    model_id: ModelId
    granted: Callable[[float], None]
    worker: Worker | None = None


class Workers:
    """Hands out workers in the order in which they were asked for.

    Args:
        num_workers: all of them spare.
        max_asleep: models that sleep in one worker at most.
    """

    def __init__(self, num_workers: int, max_asleep: int) -> None:
        self._max_asleep = max_asleep
        self._spare = [Worker() for _ in range(num_workers)]
        self._claims: collections.deque[Claim] = collections.deque()

    def claim(self, model_id: ModelId, granted: Callable[[float], None], now: float) -> Claim:
        """`granted` is called as soon as there is a worker, perhaps before this returns."""
        claim = Claim(model_id, granted)
        self._claims.append(claim)
        self._assign(now)
        return claim

    def withdraw(self, claim: Claim) -> None:
        """A claim that was not answered is not wanted any more."""
        self._claims.remove(claim)

    def release(self, worker: Worker, now: float) -> None:
        """The worker is empty again."""
        self._spare.append(worker)
        self._assign(now)

    def add(self, now: float) -> None:
        """A new worker has started."""
        self.release(Worker(), now)

    def fall_asleep(self, worker: Worker, model_id: ModelId, source: str) -> None:
        worker.asleep.pop(model_id, None)
        worker.asleep[model_id] = source
        while len(worker.asleep) > self._max_asleep:
            worker.asleep.popitem(last=False)

    def _assign(self, now: float) -> None:
        while self._claims and self._spare:
            claim = self._claims.popleft()
            worker = self._spare.pop(_fittest(self._spare, claim.model_id))
            worker.last_model = claim.model_id
            claim.worker = worker
            claim.granted(now)


def _fittest(spare: list[Worker], model_id: ModelId) -> int:
    """Where in the list the worker to take is; the longest spare among equals.

    One in which the model sleeps, then its last one, then an unused one.
    """
    found, unfitness = 0, 3
    for place, worker in enumerate(spare):
        if model_id in worker.asleep:
            return place
        if unfitness > 1 and worker.last_model == model_id:
            found, unfitness = place, 1
        elif unfitness > 2 and worker.last_model is None:
            found, unfitness = place, 2
    return found
