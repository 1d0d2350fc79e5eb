"""Runs jobs through one modelled engine, as a node does."""

from __future__ import annotations

import dataclasses
import math

from flashserve.sim.steps import Job, SteppedEngine


@dataclasses.dataclass(frozen=True)
class Served:
    first_token_at: float
    finished_at: float


def serve(
    engine: SteppedEngine, jobs: list[tuple[float, Job]], opens_at: float | None = None
) -> dict[str, Served]:
    """Every job by its id. opens_at: when the weights are there; the engine was made closed."""
    served: dict[str, Served] = {}
    coming = sorted(jobs, key=lambda item: item[0])
    opened = opens_at is None
    while True:
        arrival = coming[0][0] if coming else math.inf
        opening = math.inf if opened or opens_at is None else opens_at
        now = min(arrival, opening, engine.next_at)
        if now == math.inf:
            return served
        if now == opening:
            engine.open(now)
            opened = True
        elif now == engine.next_at:
            for job in engine.advance(now):
                served[job.request_id] = Served(job.first_token_at, now)
        else:
            _, job = coming.pop(0)
            engine.add(job, now)
