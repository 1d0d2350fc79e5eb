"""What became of each request of a simulated run, in arrays of one row per request."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.messages.commands import Dispatch
from flashserve.sim.results import PHASES, Requests
from flashserve.sim.steps import Job
from flashserve.types import Phases, Tier

_STARTUP = ("init_s", "device_s", "dram_s", "fetch_s", "place_s")  # the last phase first
_COLUMNS = tuple(PHASES.index(name) for name in _STARTUP)
_QUEUE, _DRAM, _FETCH, _PREFILL = map(PHASES.index, ("queue_s", "dram_s", "fetch_s", "prefill_s"))


class Records:
    """Args:
    num_requests: rows; jobs name theirs by `index`.
    keep_phases: 28 bytes more for each.
    """

    def __init__(self, num_requests: int, *, keep_phases: bool = True) -> None:
        num_phases = len(PHASES) if keep_phases else 0
        self._arrays = {
            "model": np.full(num_requests, -1, np.int32),
            "arrived_at": np.full(num_requests, math.nan),
            "ttft_s": np.full(num_requests, math.nan, np.float32),
            "latency_s": np.full(num_requests, math.nan, np.float32),
            "tier": np.full(num_requests, Tier.DEVICE, np.int8),
            "is_cold": np.zeros(num_requests, np.bool_),
            "is_rejected": np.zeros(num_requests, np.bool_),
        }
        self._all_phases = np.zeros((num_requests, num_phases), np.float32)
        self._model = _writable(self._arrays["model"])
        self._arrived_at = _writable(self._arrays["arrived_at"])
        self._ttft_s = _writable(self._arrays["ttft_s"])
        self._latency_s = _writable(self._arrays["latency_s"])
        self._tier = _writable(self._arrays["tier"])
        self._is_cold = _writable(self._arrays["is_cold"])
        self._is_rejected = _writable(self._arrays["is_rejected"])
        self._phases = _writable(self._all_phases.reshape(-1)) if keep_phases else None
        self.num_arrived = 0

    def arrived(self, job: Job, model: int, at: float) -> None:
        self._model[job.index] = model
        self._arrived_at[job.index] = at
        self.num_arrived += 1

    def dispatched(self, job: Job, dispatch: Dispatch, at: float) -> None:
        """The first token's wait is over; what a replica lost before it took counts as queue."""
        index = job.index
        if job.num_emitted or (dispatch.tier is Tier.DEVICE and dispatch.startup is None):
            return
        self._tier[index] = dispatch.tier
        if dispatch.startup is not None:
            self._is_cold[index] = True
        if self._phases is not None:
            self._split(index * len(PHASES), dispatch.startup, at - self._arrived_at[index])

    def _split(self, row: int, startup: Phases | None, waited_s: float) -> None:
        """The part of a start that fell into the waiting, its end first; the rest is queue."""
        assert self._phases is not None
        for name, column in zip(_STARTUP, _COLUMNS, strict=True):
            part = min(getattr(startup, name), waited_s) if startup is not None else 0.0
            self._phases[row + column] = part
            waited_s -= part
        self._phases[row + _QUEUE] = max(waited_s, 0.0)

    def rejected(self, job: Job) -> None:
        self._is_rejected[job.index] = True

    def finished(self, job: Job, at: float) -> None:
        self.first_token(job)
        self._latency_s[job.index] = at - self._arrived_at[job.index]

    def first_token(self, job: Job) -> None:
        """Of a job that has one: call it for those that the run's end cuts off, too."""
        index = job.index
        first_token_at, gated_s = job.first_token_at, job.gated_s
        if math.isnan(first_token_at):
            return
        self._ttft_s[index] = first_token_at - self._arrived_at[index]
        if gated_s > 0:
            self._is_cold[index] = True
        if self._phases is None:
            return
        row = index * len(PHASES)
        self._phases[row + _PREFILL] = max(first_token_at - job.dispatched_at - gated_s, 0.0)
        if gated_s > 0:
            self._phases[row + (_FETCH if self._tier[index] == Tier.REMOTE else _DRAM)] += gated_s

    def requests(self) -> Requests:
        """The rows of all that arrived."""
        shown = {name: array[: self.num_arrived] for name, array in self._arrays.items()}
        phases = None if self._phases is None else self._all_phases[: self.num_arrived]
        del shown["latency_s"]
        return Requests(**shown, phases=phases)

    @property
    def latency_s(self) -> npt.NDArray[np.float32]:
        """[requests], arrival to last token; NaN for one that has none."""
        return self._arrays["latency_s"][: self.num_arrived]


def _writable(array: npt.NDArray[Any]) -> Any:
    """The array, one value of which is set in half the time that numpy takes."""
    return array.data
