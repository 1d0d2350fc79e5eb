"""Features and targets of many minutes of many series, for training."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Floats
from flashserve.forecast.hazard import Pool, Singles, learn_pool
from flashserve.forecast.network.features import LEADS, NUM_FEATURES, OF_THE_DAY, Features
from flashserve.forecast.network.weights import NetworkWeights, due_logits

# Fewer days than this teach nothing of days.
_DAYS_FOR_SEASONS = 3
_MIN_SERIES = 32
_FARTHEST = 8.0


@dataclasses.dataclass(frozen=True, slots=True)
class Cells:
    """Some series x minutes. x [.., F]; the others [.., K], about the K leads.

    due: log odds of each interval by the gap histogram. at_risk: nothing came before the interval,
    and it is known. arrived: something came in it. more: arrivals beyond the first within the lead,
    NaN where there were none. offset: log of what is expected of `more`; shape [.., 1]: log of the
    shape that it is expected to have. weights: [series].
    """

    x: Singles
    due: Singles
    at_risk: Singles
    arrived: Singles
    more: Singles
    offset: Singles
    shape: Singles
    weights: Singles


@dataclasses.dataclass(frozen=True, slots=True)
class Dataset:
    """rows: [minutes, series, F], half precision, normalised. counts: [series, minutes]."""

    rows: npt.NDArray[np.float16]
    due: npt.NDArray[np.float16]
    offset: npt.NDArray[np.float16]
    shape: npt.NDArray[np.float16]
    counts: Floats
    weights: Singles
    mean: Singles
    scale: Singles
    low: Singles
    high: Singles
    pool: Pool

    @property
    def num_series(self) -> int:
        return int(self.rows.shape[1])

    @property
    def num_minutes(self) -> int:
        return int(self.rows.shape[0])

    def cells(self, series: npt.NDArray[np.intp], first: int, last: int) -> Cells:
        """Minutes [first, last) of these series."""
        last = min(last, self.num_minutes)

        def part(table: npt.NDArray[np.float16]) -> Singles:
            taken = table[first:last][:, series].swapaxes(0, 1)
            return np.ascontiguousarray(taken, dtype=np.float32)

        at_risk, arrived, more = targets(
            self.counts[series, first : last + LEADS[-1]], last - first
        )
        return Cells(
            part(self.rows),
            part(self.due),
            at_risk,
            arrived,
            more,
            part(self.offset),
            part(self.shape),
            self.weights[series],
        )


def targets(counts: Floats, num_minutes: int) -> tuple[Singles, Singles, Singles]:
    """at_risk, arrived and more, see `Cells`, of the first `num_minutes` of [series, minutes].

    An interval of which a minute is not known (NaN, or after the end) is not at risk.
    """
    beyond = np.full((len(counts), num_minutes + LEADS[-1]), np.nan)
    beyond[:, : counts.shape[1]] = counts
    summed = np.zeros((3, len(counts), beyond.shape[1] + 1))
    unknown = np.isnan(beyond)
    values = np.where(unknown, 0.0, beyond)
    for table, per_minute in zip(summed, (values, values > 0, unknown), strict=True):
        np.cumsum(per_minute, axis=1, out=table[:, 1:])
    at = np.arange(num_minutes)
    until = np.stack([summed[:, :, at + lead] - summed[:, :, at] for lead in LEADS], axis=3)
    total, active, num_unknown = until
    before = np.concatenate([np.zeros((*active.shape[:2], 1)), active[..., :-1]], axis=2)
    at_risk = (before == 0) & (num_unknown == 0)
    arrived = at_risk & (active > 0)
    more = np.where((active > 0) & (num_unknown == 0), total - 1, np.nan)
    return at_risk.astype(np.float32), arrived.astype(np.float32), more.astype(np.float32)


def make_dataset(
    counts: Floats,
    start: int,
    weights: Floats,
    max_cells: int,
    draw: np.random.Generator,
    begin: NetworkWeights | None = None,
) -> Dataset:
    """Replays the counts minute by minute, as serving does, and keeps what was seen.

    Series are drawn and then the oldest minutes left out until there are `max_cells`.
    With `begin`, what it normalises by and its pool stay. Weights count by their square roots: a
    rare function can stand for thousands, and a few such series would be all that is learnt.

    Raises:
        InputError: no minute is known.
    """
    if not (~np.isnan(counts)).any():
        raise InputError("there is nothing to learn from: no minute of any series is known")
    weights = np.sqrt(np.maximum(weights, 0))
    pool = begin.pool if begin is not None else learn_pool(counts, weights)
    num_series = min(len(counts), max(max_cells // max(counts.shape[1], 1), _MIN_SERIES))
    if num_series < len(counts):
        chosen = np.sort(draw.choice(len(counts), num_series, replace=False))
        counts, weights = counts[chosen], weights[chosen]
    num_minutes = min(counts.shape[1], max(max_cells // num_series, 1))
    skipped = counts.shape[1] - num_minutes
    raw = np.empty((num_minutes, num_series, NUM_FEATURES), dtype=np.float16)
    due = np.empty((num_minutes, num_series, len(LEADS)), dtype=np.float16)
    offset = np.empty_like(due)
    shape = np.empty((num_minutes, num_series, 1), dtype=np.float16)
    features = Features(num_series, start, pool)
    for minute, column in enumerate(counts.T):
        if minute >= skipped:
            rows = features.rows()
            raw[minute - skipped] = rows
            due[minute - skipped] = due_logits(rows)
            offset[minute - skipped] = features.log_offset()
            shape[minute - skipped, :, 0] = features.shape_offset()
        features.advance(column)
    shift = (begin.mean, begin.scale, begin.low, begin.high) if begin else _normalisation(raw)
    for table in raw:
        table[:] = np.clip((table.astype(np.float32) - shift[0]) * shift[1], shift[2], shift[3])
    share = (weights / max(float(weights.mean()), 1e-12)).astype(np.float32)
    return Dataset(raw, due, offset, shape, counts[:, skipped:], share, *shift, pool)


def _normalisation(raw: npt.NDArray[np.float16]) -> tuple[Singles, Singles, Singles, Singles]:
    """mean, scale, low and high of each feature; a feature that never varies is switched off."""
    sample = raw[:: max(len(raw) // 100, 1)].reshape(-1, NUM_FEATURES).astype(np.float32)
    mean, deviation = sample.mean(axis=0), sample.std(axis=0)
    varies = deviation > 1e-4
    if len(raw) < _DAYS_FOR_SEASONS * 1440:
        varies[list(OF_THE_DAY)] = False
    scale = np.where(varies, 1 / np.maximum(deviation, 1e-4), 0).astype(np.float32)
    low = np.maximum((sample.min(axis=0) - mean) * scale, -_FARTHEST)
    high = np.minimum((sample.max(axis=0) - mean) * scale, _FARTHEST)
    return mean, scale, low.astype(np.float32), high.astype(np.float32)
