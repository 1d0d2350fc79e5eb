"""What gives way when replica slots or DRAM are short: whatever is worth least to keep.

The worth of keeping something is the time that it saves per second of waiting: what a restart
would cost, times how soon it is likely to be used again, taken as one over how long it has been
idle. With equal restart costs this is LRU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flashserve.policy import text
from flashserve.types import ModelId, ReplicaId

_MIN_IDLE_S = 1e-3


@dataclasses.dataclass(frozen=True, slots=True)
class Candidate:
    """An idle replica, or a model's bytes in DRAM that nobody uses.

    num_bytes: what leaving DRAM would free; replica_ids: idle replicas to stop before that.
    """

    model_id: ModelId
    idle_s: float
    restart_s: float
    num_bytes: int = 0
    replica_ids: tuple[ReplicaId, ...] = ()

    @property
    def worth(self) -> float:
        return self.restart_s / max(self.idle_s, _MIN_IDLE_S)


def least_worth(candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate whose slot is given up first. Ties break on the model's identifier."""
    return min(candidates, key=lambda c: (c.worth, c.model_id, c.replica_ids), default=None)


def choose_victims(
    candidates: Iterable[Candidate], need_bytes: int
) -> tuple[Candidate, ...] | None:
    """Candidates that together free at least `need_bytes`, worth least per byte first.

    None when all of them together are not enough. A candidate that a later, larger one makes
    needless is kept.
    """
    ranked = sorted(candidates, key=lambda c: (c.worth / max(c.num_bytes, 1), c.model_id))
    chosen: list[Candidate] = []
    freed = 0
    for candidate in ranked:
        if freed >= need_bytes:
            break
        chosen.append(candidate)
        freed += candidate.num_bytes
    if freed < need_bytes:
        return None
    for candidate in list(chosen):
        if freed - candidate.num_bytes >= need_bytes:
            chosen.remove(candidate)
            freed -= candidate.num_bytes
    return tuple(chosen)


def stop_reason(candidate: Candidate, for_model: ModelId) -> str:
    return (
        f"slot given to {for_model}: idle {text.seconds(candidate.idle_s)}, "
        f"restart {text.seconds(candidate.restart_s)}"
    )


def evict_reason(candidate: Candidate, for_model: ModelId) -> str:
    return (
        f"evicted for {for_model}: idle {text.seconds(candidate.idle_s)}, "
        f"frees {text.size(candidate.num_bytes)}"
    )
