"""A model at rest, for tests of policies."""

from __future__ import annotations

import msgspec

from flashserve.policy.hazards import Hazards
from flashserve.policy.plans import Facts
from flashserve.types import ModelId, Scaling, SeriesForecast, Tier

LEADS = (60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)


def facts(**changes: object) -> Facts:
    """Cold in DRAM, a second from a start, without requests."""
    known = Facts(
        ModelId("m"),
        size_bytes=14_000_000_000,
        tier=Tier.DRAM,
        restart_s=1.0,
        prefill_s=0.1,
        run_s=4.0,
        limit=8,
        num_replicas=0,
        in_flight=0,
        waiting=0,
        idle_since=None,
        last_arrival_at=None,
        unseen_since=None,
        keep_alive_s=300.0,
        has_own_keep_alive=False,
        scaling=Scaling(0, 4),
    )
    if isinstance(said := changes.get("forecast"), SeriesForecast):
        changes["forecast"] = Hazards(said)
    return msgspec.structs.replace(known, **changes)  # type: ignore[arg-type]


def forecast(
    p_per_minute: float, *, made_at: float = 0.0, mean: float = 0.0, upper: float | None = None
) -> SeriesForecast:
    """A constant hazard; mean and upper are per minute."""
    p = tuple(1 - (1 - p_per_minute) ** (lead / 60) for lead in LEADS)
    means = tuple(mean * lead / 60 for lead in LEADS)
    uppers = tuple((mean if upper is None else upper) * lead / 60 for lead in LEADS)
    return SeriesForecast(ModelId("m"), made_at, LEADS, p, means, uppers)
