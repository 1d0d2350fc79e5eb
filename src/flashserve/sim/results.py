"""What one simulated run leaves behind: requests, seconds of workers and bytes, tiers over time."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from flashserve.types import ModelId

Floats = npt.NDArray[np.float64]

PHASES = ("queue_s", "place_s", "fetch_s", "dram_s", "device_s", "init_s", "prefill_s")


@dataclasses.dataclass(frozen=True, slots=True)
class Requests:
    """One row for each request, in order of arrival.

    model: [requests], index into Results.models. ttft_s: arrival to first token; NaN for a request
    that was rejected, and for one that the run's end cut off. tier: where its model was when it
    arrived (Tier). is_cold: it waited for a start, whoever caused that. phases: [requests, PHASES],
    where its time to the first token went; None when they were not kept.
    """

    model: npt.NDArray[np.int32]
    arrived_at: Floats
    ttft_s: npt.NDArray[np.float32]
    tier: npt.NDArray[np.int8]
    is_cold: npt.NDArray[np.bool_]
    is_rejected: npt.NDArray[np.bool_]
    phases: npt.NDArray[np.float32] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of each model, [models]: of workers by what they did, and of GB (10^9) by tier.

    busy: with requests; loading: until ready; idle: ready without requests.
    """

    busy_s: Floats
    loading_s: Floats
    idle_s: Floats
    dram_gb_s: Floats
    disk_gb_s: Floats


@dataclasses.dataclass(frozen=True, slots=True)
class Timeline:
    """Samples at equal distances. tiers: [samples, 4], models by the best tier that holds them."""

    at: Floats
    tiers: npt.NDArray[np.int32]
    busy: npt.NDArray[np.int32]
    loading: npt.NDArray[np.int32]
    idle: npt.NDArray[np.int32]


@dataclasses.dataclass(frozen=True, slots=True)
class Decided:
    """One command that was no request's: verb (start, stop, stage, evict), and why."""

    at: float
    verb: str
    model_id: ModelId
    node_id: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """One policy on one workload and cluster.

    cohorts: [models], the kind of each model's traffic. duration_s: what is reported. num_events:
    handled by the controller; wall_s: real seconds that the run took.
    """

    policy: str
    models: tuple[ModelId, ...]
    cohorts: tuple[str, ...]
    num_workers: int
    duration_s: float
    requests: Requests
    spent: Spent
    timeline: Timeline
    decisions: tuple[Decided, ...]
    num_commands: dict[str, int]
    num_events: int
    wall_s: float
