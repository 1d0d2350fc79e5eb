"""What a warm-up policy would have cost: minute by minute, from what was known before each.

A policy says for each minute whether the model is warm in it. A minute with arrivals in which it
is not warm is a cold start; a warm minute without arrivals is an idle minute. Minutes that nobody
watched (NaN) are neither. A cold start costs as much as `cold_cost` idle minutes, so a keep-alive
of that many minutes is the classical balance (ski rental), and a model whose chance of an arrival
is p is worth warming when p * cold_cost > 1 - p.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats, History

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]


class Policy(Protocol):
    """Decides for all minutes from `first` on, each from the minutes before it alone."""

    name: str

    def warm(self, history: History, first: int) -> Bools:
        """[series, history.end - first]: whether each series is warm in each minute."""


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """Of each series: minutes with arrivals, those of them that were cold, and idle minutes.

    active: [series]; cold and idle: [..., series], leading axes over policies.
    """

    active: Floats
    cold: Floats
    idle: Floats

    def cold_share(self, weights: Floats) -> Floats:
        """[...], of all minutes with arrivals; 0 where there are none."""
        total = float(self.active @ weights)
        shares: Floats = self.cold @ weights / total if total else np.zeros(self.cold.shape[:-1])
        return shares

    def idle_minutes(self, weights: Floats) -> Floats:
        """[...], in all."""
        minutes: Floats = self.idle @ weights
        return minutes

    def cost(self, cold_cost: float, weights: Floats) -> Floats:
        """[...], in idle minutes."""
        total: Floats = (self.cold * cold_cost + self.idle) @ weights
        return total


def replay(warm: Bools, counts: npt.NDArray[np.float32]) -> Outcome:
    """The outcome of one policy; both [series, minutes]."""
    active = counts > 0
    empty = counts == 0  # not of NaN
    return Outcome(
        active.sum(axis=1).astype(np.float64),
        (active & ~warm).sum(axis=1).astype(np.float64),
        (empty & warm).sum(axis=1).astype(np.float64),
    )


def stack(outcomes: Sequence[Outcome]) -> Outcome:
    """Outcomes of several policies over the same minutes as one: [policies, series]."""
    cold = np.stack([outcome.cold for outcome in outcomes])
    return Outcome(outcomes[0].active, cold, np.stack([outcome.idle for outcome in outcomes]))


def keep_alive(counts: npt.NDArray[np.float32], first: int, minutes: int) -> Bools:
    """Warm in minute t when anything arrived in [t - minutes, t).

    counts: [series, minutes]; first: the first column that is decided.
    """
    ages = ages_before(counts, first)
    return (ages <= minutes) & (ages > 0)


def ages_before(counts: npt.NDArray[np.float32], first: int) -> Ints:
    """[series, columns - first]: how many minutes before each minute the last arrival was, from 1.

    0 where there was none yet.
    """
    columns = np.arange(counts.shape[1])
    last = np.maximum.accumulate(np.where(counts > 0, columns, -1), axis=1)
    before = np.concatenate([np.full((len(counts), 1), -1), last[:, :-1]], axis=1)[:, first:]
    return np.where(before < 0, 0, columns[first:] - before)


def sweep_keep_alives(
    counts: npt.NDArray[np.float32], first: int, keep_alives: Sequence[int]
) -> Outcome:
    """Outcomes of fixed keep-alives (ascending minutes), [keep-alives, series], in one pass."""
    ages = ages_before(counts, first).astype(np.float64)
    # A keep-alive decides by age as a threshold does by chance: the younger, the likelier.
    score = np.where(ages > 0, -ages, -np.inf)
    below = np.array([-(minutes + 0.5) for minutes in keep_alives])
    return sweep_thresholds(score, counts[:, first:], below)


def sweep_thresholds(score: Floats, counts: npt.NDArray[np.float32], thresholds: Floats) -> Outcome:
    """Outcomes of being warm wherever `score` exceeds a threshold: [thresholds, series].

    score: [series, minutes], such as the chance of an arrival; thresholds: in any order.
    """
    order = np.argsort(thresholds)
    num_thresholds = len(thresholds)
    # A score is above so many of the ascending thresholds: it is warm under each of them.
    above = np.searchsorted(thresholds[order], score, side="left")
    cold = np.zeros((num_thresholds, len(score)))
    idle = np.zeros((num_thresholds, len(score)))
    for row, (steps, count) in enumerate(zip(above, counts, strict=True)):
        active = np.bincount(steps[count > 0], minlength=num_thresholds + 1)
        empty = np.bincount(steps[count == 0], minlength=num_thresholds + 1)
        cold[order, row] = np.cumsum(active)[:num_thresholds]
        idle[order, row] = empty.sum() - np.cumsum(empty)[:num_thresholds]
    return Outcome((counts > 0).sum(axis=1).astype(np.float64), cold, idle)


def fixed_threshold(cold_cost: float) -> float:
    """The chance of an arrival above which a warm minute is cheaper than the risk."""
    return 1 / (1 + cold_cost)


def idle_at(cold_shares: Floats, idle_minutes: Floats, at: float) -> float:
    """The idle minutes of the best policies whose share of cold starts is `at`.

    cold_shares, idle_minutes: [policies]. Between two policies the figure is that of taking each
    for a part of the series, so what counts is the lower convex hull. Infinite where no policy is
    as seldom cold; that of the cheapest where all are.
    """
    shares, minutes = lower_hull(cold_shares, idle_minutes)
    if at < shares[0]:
        return float("inf")
    return float(np.interp(at, shares, minutes))


def idle_over(ours: float, reference: float) -> float:
    """The ratio of idle minutes; NaN where the reference is infinite (`idle_at`) or nothing."""
    return ours / reference if 0 < reference < float("inf") else float("nan")


def lower_hull(shares: Floats, minutes: Floats) -> tuple[Floats, Floats]:
    """The corners of the frontier: shares ascending, minutes descending and convex."""
    order = np.lexsort((minutes, shares))
    hull: list[tuple[float, float]] = []
    for point in zip(shares[order].tolist(), minutes[order].tolist(), strict=True):
        if hull and point[1] >= hull[-1][1]:
            continue
        while len(hull) > 1 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    corners = np.array(hull)
    return corners[:, 0], corners[:, 1]


def _is_above(
    middle: tuple[float, float], left: tuple[float, float], right: tuple[float, float]
) -> bool:
    """Whether the middle point lies on or above the line from left to right."""
    rise = (right[1] - left[1]) * (middle[0] - left[0])
    return (middle[1] - left[1]) * (right[0] - left[0]) >= rise


def threshold_at(
    score: Floats, counts: npt.NDArray[np.float32], weights: Floats, cold_share: float
) -> float:
    """The highest threshold whose share of cold starts is at most `cold_share`.

    That is what is fixed on the fitting period. Where even the lowest score leaves more cold, the
    threshold lies below all of them.
    """
    active = counts > 0
    scores = score[active]
    order = np.argsort(scores)
    shares = np.cumsum(np.broadcast_to(weights[:, None], active.shape)[active][order])
    if not len(shares) or shares[-1] == 0:
        return 0.0
    # With the threshold at a score, that score and all below it are cold.
    allowed = int(np.searchsorted(shares / shares[-1], cold_share, side="right"))
    ordered = scores[order]
    # Scores that are equal to the first forbidden one are all forbidden.
    while allowed > 0 and allowed < len(ordered) and ordered[allowed - 1] == ordered[allowed]:
        allowed -= 1
    return float(ordered[allowed - 1]) if allowed else float(np.nextafter(ordered[0], -np.inf))
