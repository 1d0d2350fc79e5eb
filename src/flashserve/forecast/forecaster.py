"""The forecaster: told of arrivals as they come, asked what will come.

Pure given its state: time is an argument. A model that follows minutes does the forecasting; this
makes the minutes, for series that come and go, from events that are late or missing and a clock
that jumps:

- Counts add up, each in the minute of its own time, until a tick closes that minute. A count that
  comes up to five minutes after that goes to the first open minute; older ones are dropped and
  counted in `num_dropped`.
- A tick closes the minutes before now. A minute of which nothing was told had no arrivals, unless
  more than ten minutes are closed at once: then nobody watched, and it is unknown.
- A clock that steps back by up to five minutes closes nothing until it has caught up. If it jumps
  back farther, or ahead by more than an hour, the forecaster goes with it: at most an hour of
  minutes is told, so that a jump of days costs no more, and what a series knows of the time of
  day stays with the clock.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.arrivals import MINUTE_S, minute_of
from flashserve.forecast.core import Follower, FollowingModel, Prediction
from flashserve.forecast.outlook import GRID, Forecast, Outlook, Told, check_leads, read_between
from flashserve.forecast.pending import MAX_LATE_MINUTES, PendingMinutes
from flashserve.forecast.rows import Layout
from flashserve.types import SeriesForecast

VERSION = 1
MAX_TOLD_MINUTES = 60
REFRESH_MINUTES = 10
"""A forecast that does not change is told again, so that it is not taken for one that is late."""
_MAX_QUIET_MINUTES = 10
_MAX_TIME_S = 1e11
# Chances below this one are all alike to who decides what to warm.
_LEAST_CHANCE = 1e-3


@runtime_checkable
class Choosing(Protocol):
    """A follower that has several models to choose from."""

    def sources(self, rows: npt.NDArray[np.intp]) -> tuple[list[str], list[str]]:
        """Of each of these series: the name of the model that speaks, and why that one."""


class Forecaster:
    """Forecasts of every series that it was told of and did not forget.

    model: fitted; what it knows of all series is its own and not in the exported state. minute: the
    first minute (since 1970, UTC) that will be told.
    """

    def __init__(self, model: FollowingModel, minute: int) -> None:
        self.minute = minute
        self._use(model)
        self._follower: Follower = model.follow((), minute)
        self._pending = PendingMinutes()
        self._row_of: dict[str, int] = {}
        self._free: list[int] = []
        self._num_rows = 0
        self._told = Told()

    def _use(self, model: FollowingModel) -> None:
        self._model = model
        self._layout = Layout(model)
        self._said: Prediction | None = None

    def __len__(self) -> int:
        return len(self._row_of)

    def __contains__(self, series: str) -> bool:
        return series in self._row_of

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._row_of)

    @property
    def made_at(self) -> float:
        """The time from which forecasts look ahead: the end of the last closed minute."""
        return float(self.minute * MINUTE_S)

    @property
    def num_dropped(self) -> int:
        """Counts that came too late, or were too many for the minutes not closed yet."""
        return self._pending.num_dropped

    def watch(self, series: str) -> None:
        """Forecast a series from now on, of which nothing has arrived yet."""
        self._admit([series])

    def forget(self, series: str) -> None:
        """Drop all that is known of a series; nothing happens if there is none."""
        self._pending.forget(series)
        row = self._row_of.pop(series, None)
        if row is not None:
            self._free.append(row)

    def observe(self, series: str, t: float, count: float = 1) -> None:
        """`count` more arrivals at Unix time `t` (seconds). See the module for late ones.

        What is no count (NaN, negative, over MAX_COUNT) makes that minute of that series unknown.

        Raises:
            ValueError: t is not a time.
        """
        if not (math.isfinite(t) and abs(t) <= _MAX_TIME_S):
            raise ValueError(f"an arrival of {series} at {t}: not a Unix time in seconds")
        self.observe_minute(series, minute_of(t), count)

    def observe_minute(self, series: str, minute: int, count: float) -> None:
        """`count` more arrivals in a minute (since 1970, UTC)."""
        self._pending.add(series, minute, count)

    def tick(self, now: float) -> int:
        """Close all minutes before the Unix time `now`; returns how many were told."""
        wanted = minute_of(now)
        if wanted < self.minute - MAX_LATE_MINUTES:
            self._pending.pull_back(wanted)
            self._set_minute(wanted)
        num_minutes = max(wanted - self.minute, 0)
        is_watched = num_minutes <= _MAX_QUIET_MINUTES
        num_told = min(num_minutes, MAX_TOLD_MINUTES)
        for number in range(num_told):
            if number == MAX_TOLD_MINUTES // 2 and num_minutes > num_told:
                self._set_minute(wanted - MAX_TOLD_MINUTES // 2)
            self.close_minute(is_watched=is_watched)
        return num_told

    def close_minute(self, *, is_watched: bool = True) -> None:
        """Close the first open minute; what `tick` does, and whoever replays a history.

        is_watched: whether series of which nothing was told had no arrivals; else that is unknown.
        """
        self._pending.drop_before(self.minute)
        closed = self._pending.close(self.minute)
        self._admit(closed)
        counts = np.full(self._num_rows, np.nan)
        if is_watched:
            counts[self._rows(self._row_of)] = 0.0
        counts[self._rows(closed)] = list(closed.values())
        self._follower.advance(counts)
        self.minute += 1
        self._said = None

    def predict(self, series: str, leads_s: Sequence[float]) -> Forecast:
        """What may arrive for one series within each lead from `made_at` on.

        leads_s: seconds, ascending; raises ValueError for others. A series that was never told of
        is forecast as one without history, and is watched from now on.
        """
        self._admit([series])
        return self._outlook([series], check_leads(leads_s)).forecast(0)

    def predict_all(self, leads_s: Sequence[float], series: Sequence[str] | None = None) -> Outlook:
        """The same of all series, or of these of them, as a table."""
        names = list(self._row_of) if series is None else list(series)
        return self._outlook(names, check_leads(leads_s))

    def sources(self) -> dict[tuple[str, str], int]:
        """How many series each model speaks for, and why: by name and reason."""
        models, whys = self._sources(self._rows(self._row_of))
        return collections.Counter(zip(models, whys, strict=True))

    def forecasts(
        self, leads_s: Sequence[float], also: Container[str] = ()
    ) -> list[SeriesForecast]:
        """What the controller should hear: series whose forecast changed since they were told last.

        That is by a tenth of a chance or of an upper bound, or in its source. Those in `also` are
        told again in any case.
        """
        leads = check_leads(leads_s)
        outlook = self._outlook(list(self._row_of), leads)
        size = np.concatenate([np.maximum(outlook.p_arrival, _LEAST_CHANCE), outlook.upper], axis=1)
        sources = np.array(
            [": ".join(both) for both in zip(outlook.models, outlook.whys, strict=True)], object
        )
        rows = self._rows(outlook.names)
        is_news = self._told.differ(rows, leads, size, sources)
        is_news |= np.array([name in also for name in outlook.names], np.bool_)
        self._told.set(rows[is_news], size[is_news], sources[is_news])
        return [outlook.forecast(row).told() for row in np.flatnonzero(is_news).tolist()]

    def told_again(self, arrived: Iterable[str]) -> set[str]:
        """Series to tell of after this minute even if their forecast stayed: those of which
        something arrived in it, since who reads a forecast must know whether it has seen that, and
        the others each in its turn, so that none is old.
        """
        names = list(self._row_of)
        return {*arrived, *names[self.minute % REFRESH_MINUTES :: REFRESH_MINUTES]}

    def use(self, model: FollowingModel) -> None:
        """Go on with another model of the same layout: the same one, fitted anew.

        Raises:
            InputError: the state of this one does not fit it; nothing has changed then.
        """
        follower = model.follow([""] * self._num_rows, self.minute)
        layout = Layout(model)
        layout.restore(follower, self._layout.export(self._follower), self._num_rows)
        self._use(model)
        self._follower = follower

    def export_state(self) -> dict[str, Any]:
        """Everything but the model, as arrays and plain values: see `from_state`."""
        entries = list(self._pending.entries())
        return {
            "version": VERSION,
            "model": _identity(self._model),
            "minute": self.minute,
            "num_rows": self._num_rows,
            "names": np.array(list(self._row_of), dtype=np.str_),
            "rows": np.array(list(self._row_of.values()), dtype=np.int64),
            "pending_names": np.array([series for series, _, _ in entries], dtype=np.str_),
            "pending_minutes": np.array([minute for _, minute, _ in entries], dtype=np.int64),
            "pending_counts": np.array([count for _, _, count in entries], dtype=np.float64),
            **{f"state.{k}": v for k, v in self._layout.export(self._follower).items()},
        }

    @classmethod
    def from_state(cls, model: FollowingModel, state: Mapping[str, Any]) -> Forecaster:
        """Go on from an exported state (its values may have become arrays of no dimension).

        Raises:
            InputError: it is of another version or model, or damaged.
        """
        try:
            version, name = int(state["version"]), str(state["model"])
            minute, num_rows = int(state["minute"]), int(state["num_rows"])
            rows = [int(row) for row in state["rows"]]
            row_of = dict(zip(map(str, state["names"]), rows, strict=True))
            columns = (state[f"pending_{what}"] for what in ("names", "minutes", "counts"))
            pending = [
                (str(series), int(at), float(count))
                for series, at, count in zip(*columns, strict=True)
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(
                f"the forecaster's state is damaged ({error!r}): replay the history"
            ) from error
        if version != VERSION or name != _identity(model):
            raise InputError(
                f"the forecaster's state is of version {version} and the model {name}, "
                f"not {VERSION} and {_identity(model)}: replay the history"
            )
        free = set(range(num_rows)) - set(rows)
        if len(free) + len(row_of) != num_rows or len(set(rows)) != len(row_of):
            raise InputError("the forecaster's state has rows amiss: replay the history")
        made = cls(model, minute)
        made._follower = model.follow([""] * num_rows, minute)
        own = {key.removeprefix("state."): value for key, value in state.items()}
        made._layout.restore(made._follower, own, num_rows)
        made._num_rows, made._row_of, made._free = num_rows, row_of, sorted(free, reverse=True)
        made._told.forget([], num_rows)
        for series, at, count in pending:
            made._pending.add(series, at, count)
        return made

    def _set_minute(self, minute: int) -> None:
        self.minute = minute
        self._layout.set_minute(self._follower, minute)

    def _rows(self, names: Iterable[str]) -> npt.NDArray[np.intp]:
        return np.array([self._row_of[name] for name in names], dtype=np.intp)

    def _admit(self, names: Iterable[str]) -> None:
        """Give rows to series that have none: those of forgotten ones first, then new ones."""
        new = [name for name in names if name not in self._row_of]
        if not new:
            return
        if (missing := len(new) - len(self._free)) > 0:
            num_more = max(missing, self._num_rows // 8, 8)
            self._layout.join(self._follower, self._model.follow([""] * num_more, self.minute))
            added = range(self._num_rows, self._num_rows + num_more)
            self._free = [*reversed(added), *self._free]
            self._num_rows += num_more
        rows = [self._free.pop() for _ in new]
        self._layout.overwrite(
            self._follower, np.array(rows, np.intp), self._model.follow(new, self.minute)
        )
        self._told.forget(rows, self._num_rows)
        self._row_of.update(zip(new, rows, strict=True))
        self._said = None

    def _outlook(self, names: list[str], leads_s: tuple[float, ...]) -> Outlook:
        if self._said is None:
            self._said = self._follower.forecast(GRID)
        rows = self._rows(names)
        said = read_between(self._said, rows, leads_s)
        models, whys = self._sources(rows)
        return Outlook(
            tuple(names),
            self.made_at,
            leads_s,
            said.p_arrival,
            said.mean,
            said.quantiles,
            said.components,
            models,
            whys,
        )

    def _sources(self, rows: npt.NDArray[np.intp]) -> tuple[list[str], list[str]]:
        if isinstance(self._follower, Choosing):
            return cast("Choosing", self._follower).sources(rows)
        return [self._model.name] * len(rows), ["the only model"] * len(rows)


def _identity(model: FollowingModel) -> str:
    """Its name, and those of the candidates that it follows in turn."""
    followed = [candidate.name for candidate in getattr(model, "candidates", ())]
    return f"{model.name} ({', '.join(followed)})" if followed else model.name
