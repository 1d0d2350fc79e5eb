"""What gives way when replica slots or DRAM are short: whatever is worth least to keep.

The worth of keeping something is the time that it saves per second of waiting: what a restart
would cost, times how soon it is likely to be used again, taken as one over how long it has been
idle. With equal restart costs this is LRU.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from flashserve.policy import text
from flashserve.types import ModelId, ReplicaId, Tier

_MIN_IDLE_S = 1e-3


class Candidate(msgspec.Struct, frozen=True):
    """An idle replica, or a model's bytes in DRAM that nobody uses.

    num_bytes: what leaving DRAM would free; replica_ids: idle replicas to stop before that;
    below: the tier from which the bytes would have to come back, in restart_s; rate_per_s: starts
    that a forecast expects, instead of one over how long it has been idle.
    """

    model_id: ModelId
    idle_s: float
    restart_s: float
    num_bytes: int = 0
    replica_ids: tuple[ReplicaId, ...] = ()
    below: Tier = Tier.DISK
    rate_per_s: float | None = None

    @property
    def worth(self) -> float:
        if self.rate_per_s is not None:
            return self.restart_s * self.rate_per_s
        return self.restart_s / max(self.idle_s, _MIN_IDLE_S)


def least_worth(candidates: Iterable[Candidate]) -> Candidate | None:
    """The candidate whose slot is given up first. Ties break on the model's identifier."""
    return min(candidates, key=lambda c: (c.worth, c.model_id, c.replica_ids), default=None)


def choose_victims(
    candidates: Iterable[Candidate], need_bytes: int
) -> tuple[Candidate, ...] | None:
    """Candidates that together free at least `need_bytes`, and none that is not needed for it.

    Of the sets that take the least worth per byte first, up to some point, and then one that is
    large enough for the rest, it is the one that is worth least in all: at most twice what the
    best set of any kind is worth. Ties break on the models' identifiers.

    None when all of them together are not enough.

    Source: the greedy algorithm for the minimisation knapsack, Csirik et al. 1991.
    """
    left = sorted(candidates, key=lambda c: (c.worth / max(c.num_bytes, 1), c.model_id))
    taken: list[Candidate] = []
    best: tuple[Candidate, ...] | None = None
    while left and need_bytes > 0:
        enough = (c for c in left if c.num_bytes >= need_bytes)
        last = min(enough, key=lambda c: (c.worth, c.model_id), default=None)
        if last and (best is None or _worth([*taken, last]) < _worth(best)):
            best = (*taken, last)
        cheapest = left.pop(0)
        taken.append(cheapest)
        need_bytes -= cheapest.num_bytes
    if best is None:
        return () if need_bytes <= 0 else None
    return _without_needless(best, need_bytes + sum(c.num_bytes for c in taken))


def _worth(candidates: Iterable[Candidate]) -> float:
    return math.fsum(candidate.worth for candidate in candidates)


def _without_needless(chosen: tuple[Candidate, ...], need_bytes: int) -> tuple[Candidate, ...]:
    """Keeps what is worth most first, where the others are enough."""
    spare = sum(candidate.num_bytes for candidate in chosen) - need_bytes
    kept: list[Candidate] = []
    for candidate in sorted(chosen, key=lambda c: (-c.worth, c.model_id)):
        if candidate.num_bytes <= spare:
            spare -= candidate.num_bytes
            kept.append(candidate)
    return tuple(candidate for candidate in chosen if candidate not in kept)


def stop_reason(candidate: Candidate, for_model: ModelId) -> str:
    return (
        f"slot given to {for_model}: idle {text.seconds(candidate.idle_s)}, "
        f"restart {text.seconds(candidate.restart_s)}{_expected(candidate)}"
    )


def evict_reason(candidate: Candidate, for_model: ModelId) -> str:
    return (
        f"evicted for {for_model}: idle {text.seconds(candidate.idle_s)}, "
        f"frees {text.size(candidate.num_bytes)}, comes back from {candidate.below.label} in "
        f"{text.seconds(candidate.restart_s)}{_expected(candidate)}"
    )


def _expected(candidate: Candidate) -> str:
    if candidate.rate_per_s is None:
        return ""
    return f", {text.rate(candidate.rate_per_s)} starts expected"
