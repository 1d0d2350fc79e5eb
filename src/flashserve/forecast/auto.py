"""Several forecasters side by side, of which the best of each series speaks, calibrated.

Every minute each candidate says its chance of an arrival in the next, and the one that speaks says
those of all leads. What comes of them teaches the selection (`select`), the calibration of every
candidate, cohort and lead (`calibrate`) and the watch over the chosen one (`drift`). Decisions on
warmth do not tell who counts well: where there is a network, it says how many come beyond whether
any does, until its bounds fail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.baselines import Ewma
from flashserve.forecast.calibrate import Curves, Ints, log_odds
from flashserve.forecast.cohorts import GROUPS, JUDGED_EVERY, NEW, CohortWatch
from flashserve.forecast.core import (
    QUANTILE_LEVELS,
    Floats,
    FollowingModel,
    History,
    Index,
    Prediction,
    known_counts,
    replay,
)
from flashserve.forecast.drift import COVERAGE, HOLDS, SCORE, DriftWatch
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.network.model import NetworkModel
from flashserve.forecast.network.weights import NetworkWeights
from flashserve.forecast.outlook import GRID, UPPER, coherent, read_between
from flashserve.forecast.select import Bools, Codes, Selector
from flashserve.forecast.ski import SkiRental
from flashserve.forecast.traces import COHORTS

HALF_LIVES = (5, 15, 60, 240)
_REFITS = 8
_LONG_AGO = 1 << 20


def default_candidates(weights: NetworkWeights | None = None) -> list[FollowingModel]:
    """Ski rental, EWMAs and the hazard, and with trained weights the hybrid.

    The weights hold the hazard that series share, too.
    """
    hazard = HazardModel()
    candidates: list[FollowingModel] = [SkiRental(), *(Ewma(each) for each in HALF_LIVES), hazard]
    if weights is not None:
        hazard.pool = weights.pool
        candidates.append(NetworkModel(weights))
    return candidates


def _is_plain(name: str) -> bool:
    return name == SkiRental.name or name.startswith("ewma-")


def _plain_ones(names: Sequence[str]) -> npt.NDArray[np.intp]:
    """What the drift watch falls back to: ski rental, and one EWMA.

    That is the one whose half-life is nearest to an hour: one of minutes forgets a quiet series.
    """
    half_lives = {
        index: abs(np.log(float(name.removeprefix("ewma-")) / 60))
        for index, name in enumerate(names)
        if name.startswith("ewma-")
    }
    ewma = min(half_lives, key=lambda index: half_lives[index], default=None)
    plain = [index for index, name in enumerate(names) if name == SkiRental.name or index == ewma]
    return np.array(plain, np.intp)


class AutoModel:
    """Follows candidates side by side and answers with the chosen one's calibrated forecast.

    candidates: the first speaks for new series. The one called ski-rental and one called ewma-N
    are what the drift watch falls back to. cohort: of all series, where it is known beforehand.

    Raises:
        InputError: there is no candidate to fall back to.
    """

    name = "auto"

    def __init__(
        self, candidates: Sequence[FollowingModel] | None = None, cohort: str | None = None
    ) -> None:
        self.candidates = list(default_candidates() if candidates is None else candidates)
        if not any(_is_plain(candidate.name) for candidate in self.candidates):
            raise InputError("auto needs ski-rental or an ewma among its candidates")
        self.cohort = cohort
        self._fitted: frozenset[str] = frozenset()
        self._fitted_until = 0

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Fits the candidates. Which one is best, and its calibration, only what follows tells.

        Minutes of fitted series within `history` are in sample: they teach neither.
        """
        for candidate in self.candidates:
            candidate.fit(history, weights)
        self._fitted = frozenset(history.names)
        self._fitted_until = history.end

    def follow(self, names: Sequence[str], start: int) -> AutoFollower:
        is_fitted = np.array([name in self._fitted for name in names], np.bool_)
        return AutoFollower(self, names, start, is_fitted, self._fitted_until)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class AutoFollower:
    """All candidates' states of some series, and what came of what they said."""

    def __init__(
        self,
        model: AutoModel,
        names: Sequence[str],
        start: int,
        is_fitted: Bools,
        fitted_until: int,
    ) -> None:
        num_series, num_models = len(names), len(model.candidates)
        self.minute = start
        self._names = tuple(candidate.name for candidate in model.candidates)
        self._followers = [candidate.follow(names, start) for candidate in model.candidates]
        self._plain = _plain_ones(self._names)
        has_network = NetworkModel.name in self._names
        self._network = self._names.index(NetworkModel.name) if has_network else None
        self._cohort = None if model.cohort is None else COHORTS.index(model.cohort)
        self._watch = CohortWatch(num_series)
        self._selector = Selector(self._names, num_series, first=0)
        self._drift = DriftWatch(num_models, num_series)
        # Groups of curves: leads, then models, then cohorts.
        self._curves = Curves(len(GRID) * num_models * len(GROUPS))
        self._is_fitted = is_fitted
        self._fitted_until = fitted_until
        # Minutes since the last arrival, and known minutes in a row: [series].
        self._quiet = np.full(num_series, _LONG_AGO, np.int32)
        self._num_known = np.zeros(num_series, np.int32)
        # Which model speaks, and which one says how many come: [series].
        self._speaker = np.zeros(num_series, np.int8)
        self._counter = np.zeros(num_series, np.int8)
        # What was said of the next minute: [models, series]; the 90 % quantile of who is to count:
        # [series].
        self._p_next = np.zeros((num_models, num_series))
        self._upper = np.zeros(num_series)
        self._filed = np.zeros((num_models, num_series), np.int32)
        # What was said of each lead, [series, GRID], and where it was filed, [lead, series] each.
        self._p = np.zeros((num_series, len(GRID)))
        self._num_told = 0
        self._filed_ahead = [np.full((lead, num_series), -1, np.int32) for lead in GRID[1:]]
        self._raw: list[Prediction] | None = None
        self._said: Prediction | None = None
        self._look()

    def refresh(self) -> None:
        """The state was changed from outside: what was said is to be said again."""
        self._raw = self._said = None

    def advance(self, counts: npt.ArrayLike) -> None:
        values = known_counts(counts)
        self._learn(values)
        self._watch.advance(self.minute, values)
        for follower in self._followers:
            follower.advance(values)
        self.minute += 1
        self._num_told += 1
        self._choose()
        cells = self._look()
        for lead, table, filed in zip(GRID[1:], self._filed_ahead, cells, strict=True):
            table[self._num_told % lead] = filed

    def forecast(self, leads: Sequence[int]) -> Prediction:
        if self._said is None:
            self._said = self._prediction()
        every = np.arange(len(self._speaker))
        return read_between(self._said, every, [60.0 * lead for lead in leads])

    def sources(self, rows: npt.NDArray[np.intp]) -> tuple[list[str], list[str]]:
        """Of each of these series: which model speaks, and why."""
        names = np.array(self._names, object)
        chosen, sign = self._selector.chosen[rows], self._drift.sign[rows]
        is_new = self._watch.num_active[rows] == 0
        cohorts = np.array([f"cheapest for {group} series" for group in GROUPS], object)
        whys = np.where(
            self._selector.is_own[rows], "cheapest for this series", cohorts[self._cohorts()[rows]]
        )
        whys = np.where(is_new, "no arrivals yet", whys)
        for fault, model, what in (
            (SCORE, chosen, "log score fell behind"),
            (COVERAGE, self._bounding()[rows], "counts left its bound"),
        ):
            whys = np.where(sign == fault, names[model] + f"'s {what}", whys)
        return names[self._speaker[rows]].tolist(), whys.tolist()

    def _bounding(self) -> Codes:
        """Which model is to say how many come, as long as its bounds hold: [series]."""
        chosen = self._selector.chosen
        return chosen if self._network is None else np.full_like(chosen, self._network)

    def _cohorts(self) -> Codes:
        if self._cohort is None:
            return self._watch.code
        code = self._watch.code
        return np.where(code == GROUPS.index(NEW), code, np.int8(self._cohort))

    def _groups(self, lead: int, models: npt.NDArray[np.intp]) -> Ints:
        """Of curves; lead: an index of GRID; models: [..., series]."""
        num = len(self._names)
        groups: Ints = (lead * num + models) * len(GROUPS) + self._cohorts()
        return groups

    def _learn(self, values: Floats) -> None:
        """What a minute shows of what was said of it."""
        known, active = ~np.isnan(values), values > 0
        self._quiet = np.where(active, 0, np.minimum(self._quiet + 1, _LONG_AGO)).astype(np.int32)
        self._num_known = np.where(known, self._num_known + 1, 0).astype(np.int32)
        teaches = known & ~(self._is_fitted & (self.minute < self._fitted_until))
        filed = self._filed[:, teaches]
        came = np.broadcast_to(active[teaches], filed.shape)
        self._curves.fade()
        self._curves.learn(filed.ravel(), came.ravel())
        for lead, table in zip(GRID[1:], self._filed_ahead, strict=True):
            filed = table[(self._num_told + 1) % lead]
            told = teaches & (self._num_known >= lead) & (filed >= 0)
            self._curves.learn(filed[told], self._quiet[told] < lead, 1 / lead)
        self._curves.refit(_REFITS)
        self._selector.learn(self._p_next, active, teaches, self._cohorts())
        self._drift.learn(self._p_next, self._upper, values, teaches)

    def _choose(self) -> None:
        """Judge a part of the series anew, and those that had their first arrival."""
        chosen = self._selector.chosen
        before = self._bounding().copy()
        at = np.arange(len(chosen))
        is_first = (self._watch.num_active == 1) & (self._quiet == 0)
        (rows,) = np.nonzero((at % JUDGED_EVERY == self.minute % JUDGED_EVERY) | is_first)
        self._selector.choose(rows, self._watch.num_active, self._cohorts())
        bounding = self._bounding()
        self._drift.forget_coverage(np.flatnonzero(bounding != before))
        self._drift.judge(chosen.astype(np.intp), bounding.astype(np.intp), self._plain)
        fallback = self._drift.fallback(self._plain)
        holds = self._drift.sign == HOLDS
        speaks = holds | np.isin(chosen, self._plain)
        self._speaker = np.where(speaks, chosen, fallback).astype(np.int8)
        fails = self._drift.sign == COVERAGE
        self._counter = np.where(fails, fallback, bounding).astype(np.int8)

    def _forecasts(self) -> list[Prediction]:
        """What each candidate says: of all leads where it is asked, else of the next minute."""
        if self._raw is None:
            asked = np.concatenate([self._speaker, self._counter])
            speaks = np.bincount(asked, minlength=len(self._names)) > 0
            self._raw = [
                follower.forecast(GRID if is_used else GRID[:1])
                for follower, is_used in zip(self._followers, speaks, strict=True)
            ]
        return self._raw

    def _look(self) -> list[Ints]:
        """Say what is ahead; returns where it is to be filed, of each lead but the first."""
        self.refresh()
        raw = self._forecasts()
        every, speaker = np.arange(len(self._speaker)), self._speaker.astype(np.intp)
        odds = log_odds(np.stack([said.p_arrival[:, 0] for said in raw]))
        groups = self._groups(0, np.arange(len(raw))[:, None])
        self._filed = self._curves.cells(groups, odds).astype(np.int32)
        self._p_next = self._curves.apply(groups, odds)
        self._p[:, 0] = self._p_next[speaker, every]
        odds = log_odds(self._merged("p_arrival", self._speaker))
        cells = []
        for index in range(1, len(GRID)):
            group = self._groups(index, speaker)
            cells.append(self._curves.cells(group, odds[:, index]))
            self._p[:, index] = self._curves.apply(group, odds[:, index])
        self._p = np.maximum.accumulate(self._p, axis=1)
        for index in range(len(raw)):
            self._learn_upper(index, np.flatnonzero(self._bounding() == index))
        return cells

    def _learn_upper(self, model: int, rows: npt.NDArray[np.intp]) -> None:
        """Keep the 90 % quantile of the next minute's count that a model says of some series."""
        if len(rows):
            quantiles = self._forecasts()[model].quantiles_of(rows, slice(0, 1))
            agreed = coherent(quantiles, self._p_next[model, rows, None])
            self._upper[rows] = agreed[:, 0, UPPER]

    def _merged(self, what: str, models: Codes) -> Floats:
        """p_arrival or mean, of each series by its own model: [series, GRID]."""
        merged = np.zeros_like(self._p)
        for index, said in enumerate(self._forecasts()):
            (rows,) = np.nonzero(models == index)
            if len(rows):
                merged[rows] = getattr(said, what)[rows]
        return merged

    def _prediction(self) -> Prediction:
        raw, p = self._forecasts(), self._p
        # Calibration moves the hurdle; how many come beyond the first stays as it was said.
        counter = self._counter
        chances = self._merged("p_arrival", counter)
        beyond = self._merged("mean", counter) / np.maximum(chances, 1e-9)
        mean = np.maximum.accumulate(p * np.maximum(beyond, 1.0), axis=1)

        def quantiles(rows: Index, leads: Index) -> Floats:
            wanted = np.arange(len(p))[rows]
            chances = p[wanted][:, leads]
            made = np.zeros((*chances.shape, len(QUANTILE_LEVELS)))
            for index, said in enumerate(raw):
                (at,) = np.nonzero(counter[wanted] == index)
                if len(at):
                    made[at] = said.quantiles_of(wanted[at], leads)
            return np.maximum.accumulate(coherent(made, chances), axis=1)

        components = next((said.components for said in raw if "trend" in said.components), {})
        return Prediction(p, mean, quantiles, {**components, "hazard": p[:, 0]})
