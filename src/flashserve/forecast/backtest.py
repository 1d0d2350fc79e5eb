"""Tries forecasters on a trace as they would have run: fitted on its past, judged on what came.

A trace's time has three parts. Models are fitted on the first half; thresholds, such as the one
that leaves 5 % of the starts cold, are fixed on what follows until two thirds; the last third is
reported, with everything before each minute as known. Where series are many and the trace is short
(`halves`), the series that are reported are others than those that were fitted, so neither time
nor series leak.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast import decisions, scores
from flashserve.forecast.core import ArrivalModel, Floats, FollowingModel, History, Prediction
from flashserve.forecast.decisions import Outcome, Policy
from flashserve.forecast.traces import Trace

LEADS = (1, 5, 10, 30)
COLD_SHARES = (0.05, 0.10)
COLD_COSTS = (5, 10, 30, 60)
_NUM_THRESHOLDS = 400
_MIN_MINUTES = 90

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Split:
    """`past` and `future` may have other series; columns are minutes since the trace's start.

    Models are fitted on the columns of `past` before `fit_until`, thresholds on those until
    `tune_until`; `future` is reported from column `report_from` on, which is not earlier.
    """

    past: Trace
    future: Trace
    fit_until: int
    tune_until: int
    report_from: int

    @property
    def counts(self) -> npt.NDArray[np.float32]:
        """[series, minutes] that are reported."""
        return self.future.history.counts[:, self.report_from :]

    def cohorts(self) -> tuple[str, ...]:
        """Of the reported series, judged by what came before the report."""
        return self.future.before(self.future.history.start + self.report_from).cohorts()


def split(past: Trace, future: Trace | None = None, *, halves: bool = False) -> Split:
    """Splits one trace, or fits on `past` and reports on `future`, by the same minutes of each.

    halves: of one trace, fit on one half of its series and report on the other.
    """
    if future is None:
        future = past
        if halves:
            chosen = np.array([_is_odd(name) for name in past.history.names])
            past, future = past.select(~chosen), past.select(chosen)
    # Series that nobody watched in the reported time have nothing to report.
    last = future.history.counts[:, 2 * future.history.counts.shape[1] // 3 :]
    future = future.select(np.asarray((~np.isnan(last)).any(axis=1)))
    for trace in (past, future):
        num_minutes = trace.history.counts.shape[1]
        if num_minutes < _MIN_MINUTES:
            raise InputError(
                f"the trace {trace.name} has {num_minutes} minutes, under {_MIN_MINUTES}: "
                "too few to fit on some and judge on others"
            )
        if not trace.history.names:
            raise InputError(f"the trace {trace.name} has no series for one of its halves")
    tune_until = 2 * past.history.counts.shape[1] // 3
    report_from = 2 * future.history.counts.shape[1] // 3
    return Split(past, future, 3 * tune_until // 4, tune_until, report_from)


def below(trace: Trace, per_minute: float) -> Trace:
    """The series with a weight and fewer arrivals a minute than this in the first two thirds.

    Those above are busy all the time: whether to warm them is no question.
    """
    before = trace.history.counts[:, : 2 * trace.history.counts.shape[1] // 3]
    minutes = np.maximum((~np.isnan(before)).sum(axis=1), 1)
    rates = np.nansum(before, axis=1) / minutes
    return trace.select((rates < per_minute) & (trace.weights > 0))


def _is_odd(name: str) -> bool:
    """Divides series in two halves, by nothing but their names."""
    return bool(hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 2)


def sweep(
    model: ArrivalModel,
    trace: Trace,
    first: int,
    leads: Sequence[int],
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    """P(arrival) within each lead, as said before each minute: [series, minutes, leads].

    first: the first column that is forecast. Series are told one minute after the other.
    """
    history = trace.history
    num_minutes = history.counts.shape[1]
    result = np.empty((len(history.names), num_minutes - first, len(leads)), np.float32)
    for column, said in forecasts_from(model, history, first, leads):
        result[:, column - first] = said.p_arrival
        if progress:
            progress(column + 1, num_minutes)
    return result


def forecasts_from(
    model: ArrivalModel, history: History, first: int, leads: Sequence[int], step: int = 1
) -> Iterator[tuple[int, Prediction]]:
    """Columns from `first`, each with what the model says before it, of every `step`-th minute."""
    num_minutes = history.counts.shape[1]
    if not hasattr(model, "follow"):
        for column in range(first, num_minutes, step):
            yield column, model.predict(history.before(history.start + column), leads)
        return
    follower = cast("FollowingModel", model).follow(history.names, history.start)
    for column, counts in enumerate(history.counts.T):
        if column >= first and (column - first) % step == 0:
            yield column, follower.forecast(leads)
        follower.advance(counts)


@dataclasses.dataclass(frozen=True, slots=True)
class Forecasts:
    """What a model said about the reported minutes, and the thresholds fixed before them.

    p: [series, minutes, leads]. thresholds: for being warm with the first lead, by cold share.
    """

    model: str
    p: npt.NDArray[np.float32]
    thresholds: dict[float, float]

    def at_threshold(self, threshold: float, counts: npt.NDArray[np.float32]) -> Outcome:
        return decisions.replay(self.p[..., 0] > threshold, counts)


def run_model(
    model: ArrivalModel,
    parts: Split,
    leads: Sequence[int] = LEADS,
    progress: Progress | None = None,
) -> Forecasts:
    """Fits the model, fixes thresholds, and forecasts every minute that is reported."""
    past, future = parts.past, parts.future
    start = past.history.start
    model.fit(past.history.before(start + parts.fit_until), past.weights)
    tuned = past.before(start + parts.tune_until)
    said = sweep(model, tuned, parts.fit_until, leads[:1], progress)[..., 0].astype(np.float64)
    counts = tuned.history.counts[:, parts.fit_until :]
    thresholds = {
        share: decisions.threshold_at(said, counts, past.weights, share) for share in COLD_SHARES
    }
    return Forecasts(
        model.name, sweep(model, future, parts.report_from, leads, progress), thresholds
    )


def run_policy(policy: Policy, parts: Split) -> Outcome:
    history = parts.future.history
    warm = policy.warm(history, history.start + parts.report_from)
    return decisions.replay(warm, parts.counts)


def keep_alives(parts: Split) -> Outcome:
    """Fixed keep-alives of 1 minute to 12 hours on the reported minutes."""
    lengths = sorted({*range(1, 121), *range(120, 721, 10)})
    return decisions.sweep_keep_alives(parts.future.history.counts, parts.report_from, lengths)


def frontier(forecasts: Forecasts, parts: Split) -> Outcome:
    """Outcomes of many thresholds, to draw: which of them to take is no result."""
    score = forecasts.p[..., 0].astype(np.float64)
    quantiles = np.quantile(score[parts.counts > 0], np.linspace(0, 1, _NUM_THRESHOLDS))
    return decisions.sweep_thresholds(score, parts.counts, np.unique(quantiles))


def idle_ratio(ours: Outcome, theirs: Outcome, weights: Floats) -> float:
    """Idle minutes of one policy, against the frontier of others at its share of cold starts.

    ours: cold and idle [series]; theirs: [policies, series]. NaN where there is nothing to compare
    with: none of them is as seldom cold, or the best is never idle.
    """
    share = float(ours.cold_share(weights))
    reference = decisions.idle_at(theirs.cold_share(weights), theirs.idle_minutes(weights), share)
    return decisions.idle_over(float(ours.idle_minutes(weights)), reference)


def losses(forecasts: Forecasts, parts: Split, leads: Sequence[int] = LEADS) -> Floats:
    """The mean log loss of each series and lead, [series, leads]; NaN where nothing is known."""
    history = parts.future.history
    happened = scores.arrivals_within(history.counts, parts.report_from, leads)
    return _mean_known(scores.log_loss(forecasts.p.astype(np.float64), happened))


def _mean_known(values: Floats) -> Floats:
    """Over the minutes, without those that are not known."""
    known = ~np.isnan(values)
    num_known = known.sum(axis=1)
    means: Floats = np.where(known, values, 0.0).sum(axis=1) / np.where(num_known, num_known, 1)
    return np.where(num_known > 0, means, np.nan)
