"""Results of a run that never was: two models, six requests, an hour."""

from __future__ import annotations

import numpy as np

from flashserve.sim.results import PHASES, Decided, Requests, Results, Spent, Timeline
from flashserve.types import ModelId, Tier

BUSY, RARE = ModelId("busy"), ModelId("rare")
NAN = float("nan")


def results(policy: str = "made", ttft_s: tuple[float, ...] | None = None) -> Results:
    """The fifth request is rejected, the sixth is cut off by the end; the second and third wait
    for a start that the second one caused."""
    phases = np.zeros((6, len(PHASES)), np.float32)
    phases[1] = [0.0, 0.1, 0.0, 2.0, 0.2, 0.1, 0.1]
    phases[2] = [0.0, 0.0, 0.0, 1.0, 0.2, 0.1, 0.1]
    tiers = np.array([[0, 2, 0, 0], [0, 1, 0, 1], [0, 0, 1, 1], [0, 0, 0, 2]], np.int32)
    return Results(
        policy=policy,
        models=(BUSY, RARE),
        cohorts=("bursty", "rare"),
        num_workers=4,
        duration_s=3600.0,
        requests=Requests(
            model=np.array([0, 1, 1, 0, 0, 0], np.int32),
            arrived_at=np.arange(6.0) * 60,
            ttft_s=np.array(ttft_s or (0.1, 2.5, 1.4, 0.2, NAN, NAN), np.float32),
            tier=np.array([3, Tier.DISK, Tier.DEVICE, 3, 3, 3], np.int8),
            is_cold=np.array([False, True, True, False, False, False]),
            is_rejected=np.array([False, False, False, False, True, False]),
            phases=phases,
        ),
        spent=Spent(
            busy_s=np.array([3600.0, 36.0]),
            loading_s=np.array([0.0, 36.0]),
            idle_s=np.array([1800.0, 360.0]),
            dram_gb_s=np.array([36000.0, 0.0]),
            disk_gb_s=np.array([36000.0, 36000.0]),
        ),
        timeline=Timeline(
            at=np.arange(4) * 900.0,
            tiers=tiers,
            busy=np.array([0, 1, 1, 0], np.int32),
            loading=np.array([0, 0, 1, 0], np.int32),
            idle=np.array([0, 0, 0, 2], np.int32),
        ),
        decisions=tuple(
            Decided(60.0 * at, verb, RARE, "node-0", f"because <{at}>")
            for at, verb in enumerate(["start", "stop"] * 20)
        ),
        num_commands={"start": 20, "stop": 20},
        num_events=100,
        wall_s=0.5,
    )
