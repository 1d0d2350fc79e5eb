"""Series to try forecasters on where no trace is at hand, with the statistics that were published.

Of Azure's functions 45 % run at most once an hour, 81 % at most once a minute, and 29 % are started
by timers ("Serverless in the Wild", ATC 2020, sections 3.2 and 3.3). Clients of language models
are on and off: they rest 64 % of their ten-minute windows (ServeGen, arXiv:2505.09999).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import History
from flashserve.forecast.traces import BURSTY, DAY, DIURNAL, LLM, RARE, TIMER, Trace

_SHARES = {RARE: 0.36, TIMER: 0.29, DIURNAL: 0.15, BURSTY: 0.20}
_PERIODS = (5, 10, 15, 30, 60)
_JITTER = 0.05
_RESTING = 0.64


@dataclasses.dataclass(frozen=True, slots=True)
class Synthetic:
    """A trace and the cohort that each series was made as."""

    trace: Trace
    cohorts: tuple[str, ...]


def functions(num_series: int, num_minutes: int, seed: int) -> Synthetic:
    """Functions of a platform: rare ones, timers, diurnal and bursty ones."""
    rng = np.random.default_rng(seed)
    cohorts = rng.choice(list(_SHARES), num_series, p=list(_SHARES.values()))
    rows = [_MAKERS[cohort](rng, num_minutes) for cohort in cohorts]
    return _made("synthetic-functions", rows, [str(cohort) for cohort in cohorts])


def clients(num_series: int, num_minutes: int, seed: int) -> Synthetic:
    """Clients of language models: sessions of requests, and long rests."""
    rng = np.random.default_rng(seed)
    rows = [_on_off(rng, num_minutes, 60.0, _RESTING) for _ in range(num_series)]
    return _made("synthetic-clients", rows, [LLM] * num_series)


def _made(name: str, rows: list[npt.NDArray[np.float32]], cohorts: list[str]) -> Synthetic:
    names = tuple(f"{cohort}-{number}" for number, cohort in enumerate(cohorts))
    history = History(names, 0, np.stack(rows))
    is_clients = set(cohorts) == {LLM}
    return Synthetic(Trace(name, history, np.ones(len(rows)), is_clients), tuple(cohorts))


def _rare(rng: np.random.Generator, num_minutes: int) -> npt.NDArray[np.float32]:
    """Without memory, once in an hour to once in ten days."""
    per_minute = 10 ** rng.uniform(-4.2, -1.8)
    return rng.poisson(per_minute, num_minutes).astype(np.float32)


def _timer(rng: np.random.Generator, num_minutes: int) -> npt.NDArray[np.float32]:
    """Every so many minutes, now and then a minute late or twice."""
    period = int(rng.choice(_PERIODS))
    at = np.arange(rng.integers(period), num_minutes, period)
    late = rng.random(len(at)) < _JITTER
    at = np.minimum(at + late, num_minutes - 1)
    row = np.zeros(num_minutes, np.float32)
    np.add.at(row, at, 1 + (rng.random(len(at)) < _JITTER))
    return row


def _diurnal(rng: np.random.Generator, num_minutes: int) -> npt.NDArray[np.float32]:
    """A rate that follows the day, 0.02 to 0.5 a minute in the mean."""
    mean = 10 ** rng.uniform(-1.7, -0.3)
    phase = rng.uniform(0, 2 * np.pi)
    angle = 2 * np.pi * np.arange(num_minutes) / DAY + phase
    rate = np.exp(2.0 * np.sin(angle))
    counts: npt.NDArray[np.float32] = rng.poisson(mean * rate / rate.mean()).astype(np.float32)
    return counts


def _bursty(rng: np.random.Generator, num_minutes: int) -> npt.NDArray[np.float32]:
    """Minutes of many arrivals, and rests of half an hour to hours between them."""
    return _on_off(rng, num_minutes, 10 ** rng.uniform(0.3, 1.3), rng.uniform(0.7, 0.95))


def _on_off(
    rng: np.random.Generator, num_minutes: int, on: float, resting: float
) -> npt.NDArray[np.float32]:
    """Sessions of `on` minutes in the mean; `resting` is the share of time without one."""
    off = on * resting / (1 - resting)
    row = np.zeros(num_minutes, np.float32)
    at = -int(rng.exponential(on))
    while at < num_minutes:
        end = at + 1 + int(rng.exponential(on))
        row[max(at, 0) : max(end, 0)] = 1.0
        at = end + 1 + int(rng.exponential(off))
    row *= rng.poisson(rng.uniform(0.5, 3), num_minutes)
    return row


_MAKERS = {RARE: _rare, TIMER: _timer, DIURNAL: _diurnal, BURSTY: _bursty}
