"""Is an adapter served cheapest beside others on one replica, or merged into a model of its own?

Multiplexing reads the adapter's weights in every step beside the base's, on a worker that is there
anyway. A merged checkpoint computes at the base's speed, but takes DRAM of its own and keeps a
worker of its own as long as its keep-alive lasts. With requests that come at random at a rate of
r per second and a keep-alive of k seconds, a replica is held for a share 1 - exp(-r k) of the time,
and traffic that one worker cannot compute holds several. Splitting an adapter off its base
therefore costs workers(adapter) + workers(rest) - workers(all).
"""

from __future__ import annotations

import dataclasses
import enum
import math

from flashserve.policy.cost import Prices

MIN_OBSERVED_S = 600.0
"""With less history an adapter stays where it is."""
_GIB = 1 << 30
_MIN_SAVING = 0.2
"""Of the cost now; for less nobody should change anything."""
_ABSENT = 0.5
"""A base that the rest would hold for less of the time gives its place to the merged model."""


class Choice(enum.StrEnum):
    """Ways to serve an adapter."""

    MULTIPLEX = "multiplex"
    MERGE = "merge"
    OWN_REPLICA = "own replica"


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerPrices:
    """What things cost, in workers: 1 is a worker's price. dram_per_gib: of a GiB of DRAM."""

    dram_per_gib: float


def in_workers(prices: Prices) -> WorkerPrices:
    return WorkerPrices(prices.dram_gb_per_s * (_GIB / 1e9) / prices.gpu_per_s)


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterLoad:
    """What an adapter was asked for.

    Requests and generated tokens over observed_s; `rest` is all else on the same base.
    """

    observed_s: float
    requests_per_s: float
    tokens_per_s: float
    rest_requests_per_s: float
    rest_tokens_per_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """A step of up to `batch` tokens reads base_bytes, and adapter_bytes, at bytes_per_s."""

    adapter_bytes: int
    base_bytes: int
    bytes_per_s: float
    batch: int
    keep_alive_s: float

    @property
    def worker_tokens_per_s(self) -> float:
        """What one worker computes at most."""
        return self.batch * self.bytes_per_s / self.base_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Advice:
    """The cheapest way, and the cost of multiplexing and of the best alternative, in workers."""

    choice: Choice
    multiplexed: float
    alone: float
    reason: str


def workers(requests_per_s: float, tokens_per_s: float, machine: Machine) -> float:
    """How many workers this traffic holds on average."""
    held = -math.expm1(-requests_per_s * machine.keep_alive_s)
    return max(held, tokens_per_s / machine.worker_tokens_per_s)


def advise(load: AdapterLoad, machine: Machine, prices: WorkerPrices) -> Advice:
    """What would be cheapest for the traffic seen so far."""
    step_s = machine.adapter_bytes / machine.bytes_per_s
    multiplexed = load.tokens_per_s * step_s
    own = workers(load.requests_per_s, load.tokens_per_s, machine)
    rest = workers(load.rest_requests_per_s, load.rest_tokens_per_s, machine)
    together = workers(
        load.requests_per_s + load.rest_requests_per_s,
        load.tokens_per_s + load.rest_tokens_per_s,
        machine,
    )
    split = max(own + rest - together, 0.0)
    memory = machine.base_bytes / _GIB * prices.dram_per_gib
    alone = split + memory
    numbers = (
        f"multiplexing costs {multiplexed:.4f} workers ({load.tokens_per_s:.3g} tokens/s at "
        f"{step_s * 1000:.2f} ms), a model of its own {alone:.4f} ({split:.4f} for a worker, "
        f"{memory:.4f} for memory)"
    )
    if load.observed_s < MIN_OBSERVED_S:
        minutes = load.observed_s / 60
        reason = f"seen for {minutes:.0f} of {MIN_OBSERVED_S / 60:.0f} minutes; {numbers}"
        return Advice(Choice.MULTIPLEX, multiplexed, alone, reason)
    if alone >= multiplexed * (1 - _MIN_SAVING):
        return Advice(Choice.MULTIPLEX, multiplexed, alone, numbers)
    choice = Choice.MERGE if rest < _ABSENT else Choice.OWN_REPLICA
    return Advice(choice, multiplexed, alone, numbers)
