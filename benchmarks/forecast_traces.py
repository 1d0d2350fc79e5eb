"""The traces of benchmarks/forecast.py: files, what stands in for them, and which series are used.

A file that is missing or cannot be used is left out with one line that says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from flashserve.errors import InputError
from flashserve.forecast import backtest, synthetic
from flashserve.forecast.backtest import Split
from flashserve.forecast.core import History
from flashserve.forecast.traces import Trace, read_trace
from forecast_judge import chosen_rows

# Series with fewer arrivals a minute may be let go; those with more are always busy.
BUSY = 1.0
_QUICK_SERIES = 240
_QUICK_MINUTES = 4320
_MAX_BUSY_SERIES = 600


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A trace's file, what stands in for it where there is none, and whether to divide series.

    is_drawn: its arrivals are drawn, so that each seed has others.
    """

    name: str
    file: str
    halves: bool = False
    is_drawn: bool = False
    stand_in: Callable[[int], Trace] | None = None


# Series that come and go: whether to be warm is the question.
SPARSE = (
    Source(
        "azure",
        "azure2019_functions_1day.parquet",
        halves=True,
        stand_in=lambda seed: synthetic.functions(600, 1440, seed).trace,
    ),
    Source(
        "servegen",
        "servegen_client_rates.parquet",
        is_drawn=True,
        stand_in=lambda seed: synthetic.clients(60, 4320, seed).trace,
    ),
    Source(
        "gentd26",
        "gentd26_requests.parquet",
        stand_in=lambda seed: synthetic.clients(30, 4320, seed + 100).trace,
    ),
)
# Series that are always busy: how many will come is the question.
ALWAYS_BUSY = (
    Source("azure", "azure2019_functions_1day.parquet", halves=True),
    Source("servegen", "servegen_client_rates.parquet", is_drawn=True),
    Source("gentd26", "gentd26_requests.parquet"),
    Source("azure-total", "azure2019_total_per_minute.parquet"),
    Source("burstgpt-tokens", "burstgpt_week1_tokens_per_minute.parquet"),
    Source("huawei-cold-starts", "huawei2025_region_per_minute.parquet"),
)


@dataclasses.dataclass(frozen=True, slots=True)
class Folders:
    """Where to fit and where to report; None where there are no traces."""

    past: pathlib.Path | None
    future: pathlib.Path | None

    @property
    def are_apart(self) -> bool:
        return self.past != self.future


class Traces:
    """Reads what is asked for, each file once, and says once what it leaves out."""

    def __init__(self, folders: Folders, *, quick: bool, only: Sequence[str] = ()) -> None:
        """only: names of sources, others are passed over; none of them means all."""
        self._folders = folders
        self._quick = quick
        self._only = only
        self._read: dict[tuple[pathlib.Path, int], Trace] = {}
        self._said: set[str] = set()

    def sparse(self, source: Source, seed: int) -> Split | None:
        """The series below one arrival a minute in the first two thirds, which all that decides."""
        return self._split(source, seed, lambda trace: backtest.below(trace, BUSY))

    def busy(self, source: Source, seed: int) -> Split | None:
        return self._split(source, seed, _busy)

    def _split(self, source: Source, seed: int, choose: Callable[[Trace], Trace]) -> Split | None:
        if self._only and source.name not in self._only:
            return None
        try:
            past = self._short(choose(self._trace(source, self._folders.past, seed)))
            if not self._folders.are_apart:
                return backtest.split(past, halves=source.halves)
            future = self._short(choose(self._trace(source, self._folders.future, seed)))
            return backtest.split(past, future)
        except InputError as error:
            self._say(f"left out: {source.name}: {error}")
            return None

    def _trace(self, source: Source, folder: pathlib.Path | None, seed: int) -> Trace:
        if folder is None:
            if source.stand_in is None:
                raise InputError(f"nothing stands in for {source.file}")
            return source.stand_in(seed)
        key = (folder / source.file, seed if source.is_drawn else 0)
        if key not in self._read:
            # One trace is kept for each file: seeds come one after the other.
            self._read = {k: v for k, v in self._read.items() if k[0] != key[0]}
            self._read[key] = watched(read_trace(*key))
        return self._read[key]

    def _short(self, trace: Trace) -> Trace:
        if not self._quick:
            return trace
        few = np.zeros(len(trace.weights), np.bool_)
        few[list(chosen_rows(len(few), _QUICK_SERIES))] = True
        history = trace.history
        return trace.select(few).before(
            history.start + min(history.counts.shape[1], _QUICK_MINUTES)
        )

    def _say(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            print(line, flush=True)


def watched(trace: Trace) -> Trace:
    """From the first to the last minute in which half as many series are watched as ever.

    A file may hold collections of different lengths; its thirds are those of most of its series.
    """
    counts = trace.history.counts
    num_watched = (~np.isnan(counts)).sum(axis=0)
    often = np.flatnonzero(num_watched >= max(num_watched.max(initial=0) / 2, 1))
    if not often.size:
        return trace
    first, last = int(often[0]), int(often[-1]) + 1
    history = trace.history
    cut = History(history.names, history.start + first, counts[:, first:last])
    return dataclasses.replace(trace, history=cut)


def _busy(trace: Trace) -> Trace:
    """At most so many of the series with an arrival a minute or more, by a seeded draw."""
    names = set(backtest.below(trace, BUSY).history.names)
    is_busy = np.array([name not in names for name in trace.history.names]) & (trace.weights > 0)
    rows = np.flatnonzero(is_busy)
    chosen = np.zeros(len(is_busy), np.bool_)
    chosen[rows[list(chosen_rows(len(rows), _MAX_BUSY_SERIES))]] = True
    return trace.select(chosen)


def folders_of(args: argparse.Namespace) -> Folders:
    if args.fit_traces or args.test_traces:
        if not (args.fit_traces and args.test_traces):
            raise SystemExit("--fit-traces and --test-traces go together")
        return _checked(Folders(args.fit_traces, args.test_traces))
    traces = args.traces or _default_traces()
    return _checked(Folders(traces, traces))


def _checked(folders: Folders) -> Folders:
    for folder in (folders.past, folders.future):
        if folder is not None and not folder.is_dir():
            raise SystemExit(f"no folder {folder}: name one with trace files")
    return folders


def _default_traces() -> pathlib.Path | None:
    """What FLASHSERVE_TRACES names, or the folder beside the clone, if it is there."""
    if named := os.environ.get("FLASHSERVE_TRACES"):
        return pathlib.Path(named)
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "traces"
    return beside if beside.is_dir() else None
