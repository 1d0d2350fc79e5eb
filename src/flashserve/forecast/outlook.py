"""What the forecaster says: of one series, and of all of them as a table."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import QUANTILE_LEVELS, Floats, Index, Prediction
from flashserve.forecast.hurdle import at_leads, p_at_leads
from flashserve.types import ModelId, SeriesForecast

# The leads, in minutes, that models are asked for; other leads are read between them.
GRID = (1, 2, 5, 10, 20, 30, 60)
MAX_LEAD_S = 86_400.0
# A forecast is said again when it moved by this share of itself.
_CHANGE = 0.1
UPPER = QUANTILE_LEVELS.index(0.9)


@dataclasses.dataclass(frozen=True, slots=True)
class Forecast:
    """What may arrive for one series within each lead, from `made_at` on (Unix seconds).

    p_arrival: P(at least one arrival). quantiles: of the count, by lead and QUANTILE_LEVELS.
    components: trend, daily, weekly and residual (mean arrivals per minute) and hazard (of the next
    minute), as far as the model knows them.
    """

    series: str
    made_at: float
    leads_s: tuple[float, ...]
    p_arrival: tuple[float, ...]
    mean: tuple[float, ...]
    quantiles: tuple[tuple[float, ...], ...]
    components: dict[str, float]
    model: str
    why: str

    def told(self) -> SeriesForecast:
        """What the controller hears of it."""
        return SeriesForecast(
            ModelId(self.series),
            self.made_at,
            self.leads_s,
            self.p_arrival,
            self.mean,
            tuple(levels[UPPER] for levels in self.quantiles),
            f"{self.model}: {self.why}",
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Outlook:
    """Forecasts of many series.

    p_arrival and mean: [series, leads]; quantiles: [series, leads, QUANTILE_LEVELS]. models and
    whys: of each series.
    """

    names: tuple[str, ...]
    made_at: float
    leads_s: tuple[float, ...]
    p_arrival: Floats
    mean: Floats
    quantiles: Floats
    components: dict[str, Floats]
    models: Sequence[str]
    whys: Sequence[str]

    @property
    def upper(self) -> Floats:
        """The 90 % quantile of the count: [series, leads]."""
        upper: Floats = self.quantiles[..., UPPER]
        return upper

    def forecast(self, row: int) -> Forecast:
        return Forecast(
            self.names[row],
            self.made_at,
            self.leads_s,
            tuple(self.p_arrival[row].tolist()),
            tuple(self.mean[row].tolist()),
            tuple(map(tuple, self.quantiles[row].tolist())),
            {name: float(part[row]) for name, part in self.components.items()},
            self.models[row],
            self.whys[row],
        )


class Told:
    """What was last said of each row, to say only what changed.

    That is a chance or an upper bound that moved by a tenth of the larger, or another source.
    """

    def __init__(self) -> None:
        self._leads_s: tuple[float, ...] = ()
        self._sizes: Floats = np.zeros((0, 0))
        self._sources = np.empty(0, object)

    def differ(
        self,
        rows: npt.NDArray[np.intp],
        leads_s: tuple[float, ...],
        sizes: Floats,
        sources: npt.NDArray[np.object_],
    ) -> npt.NDArray[np.bool_]:
        """Which of `rows` to tell; sizes: [rows, any], sources: [rows]."""
        if leads_s != self._leads_s:
            self._leads_s = leads_s
            self._sizes = np.full((len(self._sources), sizes.shape[1]), np.nan)
        last = self._sizes[rows]
        is_near = np.abs(sizes - last) <= _CHANGE * np.maximum(sizes, last)  # not of NaN
        is_other: npt.NDArray[np.bool_] = sources != self._sources[rows]
        return is_other | ~is_near.all(axis=1)

    def set(
        self, rows: npt.NDArray[np.intp], sizes: Floats, sources: npt.NDArray[np.object_]
    ) -> None:
        self._sizes[rows] = sizes
        self._sources[rows] = sources

    def forget(self, rows: Sequence[int], num_rows: int) -> None:
        """Nothing was said of `rows` yet, nor of those that are new; there are `num_rows`."""
        num_more = num_rows - len(self._sources)
        self._sizes = np.pad(self._sizes, ((0, num_more), (0, 0)), constant_values=np.nan)
        self._sources = np.append(self._sources, np.empty(num_more, object))
        self._sizes[rows] = np.nan


def check_leads(leads_s: Sequence[float]) -> tuple[float, ...]:
    """Raises ValueError unless they ascend within (0, MAX_LEAD_S]."""
    leads = tuple(float(lead) for lead in leads_s)
    if not leads or not all(0 < lead <= MAX_LEAD_S for lead in leads):
        raise ValueError(f"leads must be over 0 and at most {MAX_LEAD_S:g} s, not {leads_s}")
    if list(leads) != sorted(set(leads)):
        raise ValueError(f"leads must ascend, not {leads_s}")
    return leads


def read_between(
    said: Prediction, rows: npt.NDArray[np.intp], leads_s: Sequence[float]
) -> Prediction:
    """A prediction for the leads of GRID, read for some series at others: [rows, leads_s].

    Hazards and rates are steady between the leads of the grid. Whatever the reading, a quantile is
    zero exactly where no arrival is likely enough, and a mean is not below P(arrival).
    """
    minutes = (np.asarray(leads_s) / 60).tolist()
    p = _ascending(p_at_leads(GRID, said.p_arrival[rows], minutes))
    mean = _ascending(np.maximum(at_leads(GRID, said.mean[rows], minutes), p))
    # Only the leads beside those that are wanted.
    right = np.clip(np.searchsorted(GRID, minutes), 1, len(GRID) - 1)
    used = np.unique([right - 1, right])

    def quantiles(some: Index, leads: Index) -> Floats:
        levels = np.moveaxis(said.quantiles_of(rows[some], used), 1, 2)
        near = at_leads(
            np.array(GRID)[used].tolist(), levels.reshape(-1, len(used)), minutes
        ).reshape(*levels.shape[:2], len(minutes))
        counts = np.ceil(np.moveaxis(near, 2, 1) - 1e-9)
        agreed = coherent(np.maximum.accumulate(counts, axis=2), p[some])
        return _ascending(agreed)[:, leads]

    return Prediction(
        p, mean, quantiles, {name: part[rows] for name, part in said.components.items()}
    )


def _ascending(values: Floats) -> Floats:
    """With the lead, which is the second axis."""
    return np.maximum.accumulate(values, axis=1)


def coherent(quantiles: Floats, p_arrival: Floats) -> Floats:
    """Quantiles that are zero where P(arrival) leaves them no chance, and at least one else.

    quantiles: [series, leads, QUANTILE_LEVELS]; p_arrival: [series, leads].
    """
    above_zero = np.asarray(QUANTILE_LEVELS) - (1 - p_arrival[..., None]) > 0
    agreed: Floats = np.where(above_zero, np.maximum(quantiles, 1.0), 0.0)
    return agreed
