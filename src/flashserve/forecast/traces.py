"""Reads workload traces, in their publishers' own formats or as parquet files, as minute counts.

A file is recognised by its columns, not by its name. What is wrong with a file is said with its
line (for parquet: its row) and the reason. Formats: Azure Functions 2019 and 2021, Azure LLM
2023, BurstGPT and Mooncake as published (tracetext), and columnar forms of these and of ServeGen,
GenTD26 and Huawei's cold starts (traceparquet, which needs the extra `forecast`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Floats, History

LLM = "llm"
RARE, TIMER, DIURNAL, BURSTY = "rare", "timer", "diurnal", "bursty"
COHORTS = (RARE, TIMER, DIURNAL, BURSTY, LLM)

DAY = 1440
_RARE_MINUTES = 20
_TIMER_SHARE = 0.8
_DIURNAL_SHARE = 0.3
_MAX_MINUTES = 400 * DAY
_MAX_CELLS = 250_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """Minute counts of a trace's series, which all have the same minutes.

    weights: [series], how many series of the population each stands for. clients: whether the
    series are clients of language models, which form a cohort of their own. unit: what is counted.
    """

    name: str
    history: History
    weights: Floats
    clients: bool = False
    unit: str = "arrivals"

    def select(self, chosen: npt.NDArray[np.bool_]) -> Trace:
        """The trace of those series where `chosen` [series] is true."""
        names = tuple(name for name, keep in zip(self.history.names, chosen, strict=True) if keep)
        history = History(names, self.history.start, self.history.counts[chosen])
        return dataclasses.replace(self, history=history, weights=self.weights[chosen])

    def before(self, minute: int) -> Trace:
        return dataclasses.replace(self, history=self.history.before(minute))

    def cohorts(self) -> tuple[str, ...]:
        """Of each series, judged by everything in it: pass what lies before the reported time."""
        if self.clients:
            return (LLM,) * len(self.history.names)
        return tuple(cohort_of(row) for row in self.history.counts)


def read_trace(path: Path, seed: int = 0) -> Trace:
    """The trace in a file.

    seed: of the arrivals that are drawn where the file has statistics instead of arrivals.

    Raises:
        InputError: it cannot be read; says where and why.
    """
    from flashserve.forecast import traceparquet, tracetext

    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read the trace {path}: {error.strerror}") from None
    if magic == b"PAR1":
        return traceparquet.read(path, seed)
    return tracetext.read(path)


def from_events(
    path: Path,
    series: Sequence[str],
    minutes: npt.NDArray[np.int64],
    counts: npt.NDArray[np.float64] | None = None,
    *,
    clients: bool = False,
    unit: str = "arrivals",
) -> Trace:
    """One event (or `counts` events) of each series in each minute; several add up.

    A trace begins with its first event's minute and ends with its last one's.
    """
    if not len(minutes):
        raise InputError(f"{path} has no arrivals")
    start = int(minutes.min())
    num_minutes = int(minutes.max()) - start + 1
    names, rows = np.unique(np.asarray(series, dtype=str), return_inverse=True)
    check_size(path, len(names), num_minutes)
    filled = np.zeros((len(names), num_minutes), np.float32)
    np.add.at(filled, (rows, minutes - start), 1.0 if counts is None else counts)
    history = History(tuple(str(name) for name in names), start, filled)
    return Trace(path.stem, history, np.ones(len(names)), clients, unit)


def check_size(path: Path, num_series: int, num_minutes: int) -> None:
    """Raises InputError where the counts would take more memory than a trace may."""
    if num_minutes > _MAX_MINUTES:
        raise InputError(
            f"{path} spans {num_minutes / DAY:.0f} days, more than {_MAX_MINUTES // DAY}: "
            "are its times in the unit that its format has?"
        )
    if num_series * num_minutes > _MAX_CELLS:
        raise InputError(
            f"{path} has {num_series} series of {num_minutes} minutes, "
            f"more than {_MAX_CELLS:,} counts: read a part of it"
        )


def cohort_of(row: npt.NDArray[np.float32]) -> str:
    """Rare (under 20 minutes with arrivals), timer (its gaps are equal), diurnal or bursty.

    Gaps are equal when four fifths of them lie within a minute or a tenth of their median, and
    arrivals of every minute when they are as many each; a series is diurnal when a sine of one day
    explains three tenths of its hours' variance.
    """
    known = row[~np.isnan(row)]
    at = np.flatnonzero(known)
    if len(at) < _RARE_MINUTES:
        return RARE
    gaps = np.diff(at)
    middle = float(np.median(gaps))
    slack = max(1.0, middle / 10) if middle > 2 else 0.0
    if np.mean(np.abs(gaps - middle) <= slack) >= _TIMER_SHARE and (
        middle > 1 or np.mean(known[at] == np.median(known[at])) >= _TIMER_SHARE
    ):
        return TIMER
    return DIURNAL if _daily_share(known) >= _DIURNAL_SHARE else BURSTY


def _daily_share(known: npt.NDArray[np.float32]) -> float:
    """The share of the variance between hours (of roots of counts) that a daily sine explains."""
    num_hours = len(known) // 60
    if num_hours < 12:
        return 0.0
    hourly = np.sqrt(known[: num_hours * 60].reshape(num_hours, 60)).mean(axis=1)
    centred = hourly - hourly.mean()
    total = float(centred @ centred)
    if total == 0:
        return 0.0
    angle = 2 * np.pi * np.arange(num_hours) / 24
    basis = np.stack([np.ones(num_hours), np.sin(angle), np.cos(angle)], axis=1)
    fitted = basis @ np.linalg.lstsq(basis, centred, rcond=None)[0]
    return 1 - float(np.sum((centred - fitted) ** 2)) / total
