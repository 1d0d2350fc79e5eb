"""What a start costs: predicted seconds per phase, and the running averages they rest on."""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple, Self

import msgspec

from flashserve.config import PriceSettings
from flashserve.types import Phases, Tier

EXTENT_BYTES = 2 << 20
"""A model takes whole extents of a node's DRAM."""

ACCELERATOR_PER_HOUR = 3.0
"""US dollars for an H100 on demand, May 2026: 2.50 to 3.50 at providers that specialise in them.

Source: Mercatus GPU price index, https://www.mercatus-ai.com/blog/cloud-gpu-pricing.
"""
VCPU_PER_HOUR = 0.04048
"""US dollars for a vCPU without its memory, on demand, June 2026: AWS Fargate, Linux on x86,
us-east-1. A core as the kernel counts them is a vCPU.

Source: https://www.factualminds.com/blog/amazon-fargate-ecs-task-pricing-2026/.
"""
_HOUR_S = 3600.0
_CLOUD = PriceSettings()
_WEIGHT = 0.3
_MAX_STEP = 8.0


class WorkerState(enum.Enum):
    """What a start finds on a node, and so how long it waits for a worker."""

    SPARE = "a spare worker"
    STOPPING = "a worker whose replica is stopped first"
    STARTING = "a worker that is itself still starting"


class Costs(NamedTuple):
    """What a start costs on one node. Rates leave the tier that they are named after."""

    remote_bytes_per_s: float
    disk_bytes_per_s: float
    dram_bytes_per_s: float
    place_s: float
    init_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Prices:
    """What things cost, in one currency.

    gpu_per_s: of one worker's accelerator (on a CPU: of a worker's cores) for a second;
    dram_gb_per_s and disk_gb_per_s: of 10^9 bytes for a second; wait_per_s: of a second that a
    request waits for a start; slo_miss: of a first token that comes later than slo_s;
    worker_cores: what gpu_per_s is paid for, None is an accelerator.
    """

    gpu_per_s: float = ACCELERATOR_PER_HOUR / _HOUR_S
    dram_gb_per_s: float = _CLOUD.dram_gb_per_hour / _HOUR_S
    disk_gb_per_s: float = _CLOUD.disk_gb_per_hour / _HOUR_S
    wait_per_s: float = _CLOUD.wait_per_s
    slo_miss: float = _CLOUD.slo_miss
    slo_s: float = _CLOUD.slo_s
    worker_cores: float | None = None
    currency: str = _CLOUD.currency

    @classmethod
    def of(cls, price: PriceSettings, worker_cores: float | None) -> Self:
        """worker_cores: of each worker where none has an accelerator, else None.

        They decide what a worker costs where `price` does not say it.
        """
        per_hour = ACCELERATOR_PER_HOUR if worker_cores is None else worker_cores * VCPU_PER_HOUR
        if price.gpu_per_hour is not None:
            per_hour = price.gpu_per_hour
        return cls(
            gpu_per_s=per_hour / _HOUR_S,
            dram_gb_per_s=price.dram_gb_per_hour / _HOUR_S,
            disk_gb_per_s=price.disk_gb_per_hour / _HOUR_S,
            wait_per_s=price.wait_per_s,
            slo_miss=price.slo_miss,
            slo_s=price.slo_s,
            worker_cores=worker_cores,
            currency=price.currency,
        )

    @property
    def worker_text(self) -> str:
        """What a worker is that costs gpu_per_s: an accelerator, 1 core, 2.5 cores."""
        cores = self.worker_cores
        if cores is None:
            return "an accelerator"
        return "1 core" if cores == 1 else f"{cores:.3g} cores"

    def cold_start(self, startup_s: float, prefill_s: float = 0.0) -> float:
        """What one request's wait for a start costs; its prefill may be what misses the SLO."""
        is_missed = startup_s + prefill_s > self.slo_s
        return self.wait_per_s * startup_s + (self.slo_miss if is_missed else 0.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second at which they leave each tier, measured ahead; None where nobody did."""

    remote_bytes_per_s: float | None = None
    disk_bytes_per_s: float | None = None
    dram_bytes_per_s: float | None = None


UNMEASURED = Rates()


def extent_bytes(size_bytes: int) -> int:
    """Bytes of DRAM that a checkpoint of `size_bytes` takes: its image in whole extents."""
    return -(-size_bytes // EXTENT_BYTES) * EXTENT_BYTES


def predict_start(size_bytes: int, tier: Tier, costs: Costs) -> Phases:
    """Phases of a start on a node where the bytes are in `tier`; queue and prefill are 0.

    What is fetched from far goes straight to DRAM, and to disk behind that.
    """
    return Phases(
        place_s=costs.place_s,
        fetch_s=size_bytes / costs.remote_bytes_per_s if tier < Tier.DISK else 0.0,
        dram_s=size_bytes / costs.disk_bytes_per_s if tier is Tier.DISK else 0.0,
        device_s=size_bytes / costs.dram_bytes_per_s,
        init_s=costs.init_s,
    )


def startup_s(size_bytes: int, tier: Tier, costs: Costs) -> float:
    """The sum of `predict_start`, for who compares many."""
    seconds = costs.place_s + costs.init_s + size_bytes / costs.dram_bytes_per_s
    if tier is Tier.DISK:
        seconds += size_bytes / costs.disk_bytes_per_s
    elif tier < Tier.DISK:
        seconds += size_bytes / costs.remote_bytes_per_s
    return seconds


def remaining(start: Phases, elapsed_s: float) -> Phases:
    """What is left of a predicted start that has been under way for `elapsed_s`.

    A start that is overdue has nothing left: its end is not known better than "any moment".
    """
    if elapsed_s <= 0:
        return start
    left = {}
    for name in ("fetch_s", "dram_s", "place_s", "device_s", "init_s"):
        phase = getattr(start, name)
        left[name] = max(0.0, phase - max(0.0, elapsed_s))
        elapsed_s -= phase
    return msgspec.structs.replace(start, **left)


def average(old: float | None, sample: float, low: float, high: float) -> float | None:
    """The running average `old` after one more sample (exponentially weighted).

    A sample outside [low, high], or that is no number, changes nothing; within it, one sample
    counts as at most 8 times more or less than the average, so that one outlier moves it little.
    """
    if not low <= sample <= high:  # False for NaN
        return old
    if old is None:
        return sample
    if sample < old / _MAX_STEP:
        sample = old / _MAX_STEP
    elif sample > old * _MAX_STEP:
        sample = old * _MAX_STEP
    return old + _WEIGHT * (sample - old)
