"""What became of each request of a simulated run, in arrays of one row per request."""

from __future__ import annotations

import math

import numpy as np

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
        self._model = np.full(num_requests, -1, np.int32)
        self._arrived_at = np.full(num_requests, math.nan)
        self._ttft_s = np.full(num_requests, math.nan, np.float32)
        self._latency_s = np.full(num_requests, math.nan, np.float32)
        self._tier = np.full(num_requests, Tier.DEVICE, np.int8)
        self._is_cold = np.zeros(num_requests, np.bool_)
        self._is_rejected = np.zeros(num_requests, np.bool_)
        self._phases = np.zeros((num_requests, len(PHASES)), np.float32) if keep_phases else None
        self.num_arrived = 0

    def arrived(self, job: Job, model: int, at: float) -> None:
        self._model[job.index] = model
        self._arrived_at[job.index] = at
        self.num_arrived += 1

    def dispatched(self, job: Job, dispatch: Dispatch, at: float) -> None:
        """The first token's wait is over; what a replica lost before it took counts as queue."""
        if job.num_emitted:
            return
        index = job.index
        self._tier[index] = dispatch.tier
        if dispatch.startup is not None:
            self._is_cold[index] = True
        if self._phases is not None and dispatch.tier is not Tier.DEVICE:
            waited_s = at - self._arrived_at[index]
            self._phases[index] = 0.0
            self._split(index, dispatch.startup, waited_s)

    def _split(self, index: int, startup: Phases | None, waited_s: float) -> None:
        """The part of a start that fell into the waiting, its end first; the rest is queue."""
        assert self._phases is not None
        row = self._phases[index]
        if startup is not None:
            for name, column in zip(_STARTUP, _COLUMNS, strict=True):
                row[column] = part = min(getattr(startup, name), waited_s)
                waited_s -= part
        row[_QUEUE] = max(waited_s, 0.0)

    def rejected(self, job: Job) -> None:
        self._is_rejected[job.index] = True

    def finished(self, job: Job, at: float) -> None:
        self.first_token(job)
        self._latency_s[job.index] = at - self._arrived_at[job.index]

    def first_token(self, job: Job) -> None:
        """Of a job that has one: call it for those that the run's end cuts off, too."""
        index = job.index
        if math.isnan(job.first_token_at):
            return
        self._ttft_s[index] = job.first_token_at - self._arrived_at[index]
        if job.gated_s > 0:
            self._is_cold[index] = True
        if self._phases is not None:
            row = self._phases[index]
            row[_PREFILL] = max(job.first_token_at - job.dispatched_at - job.gated_s, 0.0)
            if job.gated_s:
                row[_FETCH if self._tier[index] == Tier.REMOTE else _DRAM] += job.gated_s
            waited = job.dispatched_at - self._arrived_at[index]
            if self._tier[index] == Tier.DEVICE:
                row[_QUEUE] = waited

    def requests(self) -> Requests:
        """The rows of all that arrived."""
        shown = slice(0, self.num_arrived)
        return Requests(
            model=self._model[shown],
            arrived_at=self._arrived_at[shown],
            ttft_s=self._ttft_s[shown],
            tier=self._tier[shown],
            is_cold=self._is_cold[shown],
            is_rejected=self._is_rejected[shown],
            phases=None if self._phases is None else self._phases[shown],
        )

    @property
    def latency_s(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        """[requests], arrival to last token; NaN for one that has none."""
        return self._latency_s[: self.num_arrived]
