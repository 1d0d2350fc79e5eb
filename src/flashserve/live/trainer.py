"""When the forecaster's network is trained, on what, and whether what came of it is used."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np
import structlog

from flashserve import telemetry
from flashserve.config import ForecastSettings
from flashserve.errors import FlashServeError
from flashserve.forecast.core import History
from flashserve.forecast.days import DAY_MINUTES
from flashserve.forecast.network.weights import NetworkWeights
from flashserve.live.arrivalrows import SERVER, ArrivalArrays
from flashserve.live.catalogue import Catalogue
from flashserve.live.forecastfiles import ForecastFiles
from flashserve.live.replay import history_of
from flashserve.live.training import Limits, Trained, tune_apart
from flashserve.types import ModelId

_MAX_DAYS = 14
_MAX_CELLS = 2_000_000
_SERIES_AT_ONCE = 256
# With less than this there is nothing to learn from, and nothing to compare on.
_MIN_WATCHED_MINUTES = 1440
_MIN_ACTIVE_MINUTES = 500
_LOOK_S = 3600.0
_log = structlog.get_logger(__name__)

Tune = Callable[[History, int, NetworkWeights | None, Limits, int], Awaitable[Trained]]


@dataclasses.dataclass(frozen=True, slots=True)
class TrainingReport:
    """Of the last training. outcome: taken, no_better or failed; losses as `Trained` has them."""

    at: float
    """Unix time of its end."""
    outcome: str
    reason: str = ""
    old_loss: float | None = None
    new_loss: float | None = None


class Trainer:
    """One training at a time; none changes anything but by what `train` returns."""

    def __init__(
        self,
        settings: ForecastSettings,
        catalogue: Catalogue,
        files: ForecastFiles,
        unix_time: Callable[[], float] = time.time,
        tune: Tune = tune_apart,
    ) -> None:
        self._settings = settings
        self._catalogue = catalogue
        self._files = files
        self._unix_time = unix_time
        self._tune = tune
        self._looked_at: float | None = None
        self.last: TrainingReport | None = None

    async def restore(self) -> None:
        """Read what became of the last training before this start."""
        report = await asyncio.to_thread(self._files.read_training)
        self.last = _report_from(report)

    def is_due(self) -> bool:
        """Whether to look for enough history: at most once an hour, an interval after the last."""
        now = self._unix_time()
        if not self._settings.training:
            return False
        if self.last and 0 <= now - self.last.at < self._settings.training_interval_h * 3600:
            return False
        if self._looked_at is not None and 0 <= now - self._looked_at < _LOOK_S:
            return False
        self._looked_at = now
        return True

    async def train(
        self, series: Sequence[ModelId], end: int, begin: NetworkWeights | None
    ) -> NetworkWeights | None:
        """Better weights than `begin` (or than gaps alone, without), else None, for any reason.

        end: the first minute that is not known yet.
        """
        try:
            history = await self._history(series, end)
            if history is None:
                return None
            num_held = min(DAY_MINUTES, history.counts.shape[1] // 4)
            limits = Limits(memory_bytes=self._settings.training_memory_bytes)
            _log.info(
                "training the forecaster",
                series=len(history.names),
                minutes=history.counts.shape[1],
            )
            trained = await self._tune(history, num_held, begin, limits, end // DAY_MINUTES)
        except (FlashServeError, OSError) as error:
            reason = error.message if isinstance(error, FlashServeError) else str(error)
            _log.warning("training the forecaster failed", reason=reason)
            await self._close(TrainingReport(self._unix_time(), "failed", reason))
            return None
        outcome = "taken" if trained.is_better else "no_better"
        losses = trained.old_loss, trained.new_loss
        _log.info("trained the forecaster", outcome=outcome, old=losses[0], new=losses[1])
        await self._close(TrainingReport(self._unix_time(), outcome, "", *losses))
        return trained.weights if trained.is_better else None

    async def _history(self, series: Sequence[ModelId], end: int) -> History | None:
        """Series that have arrivals, drawn until there are enough; None when it is too little."""
        begin = end - _MAX_DAYS * DAY_MINUTES
        (ran,) = await self._catalogue.arrival_arrays([SERVER], begin, end - 1)
        if len(ran[0]) < _MIN_WATCHED_MINUTES:
            return None
        begin = max(begin, int(ran[0][0]))
        max_series = max(_MAX_CELLS // (end - begin), 1)
        draw = np.random.default_rng(end // DAY_MINUTES)
        order = [series[index] for index in draw.permutation(len(series))]
        names: list[ModelId] = []
        found: list[ArrivalArrays] = []
        for first in range(0, len(order), _SERIES_AT_ONCE):
            piece = order[first : first + _SERIES_AT_ONCE]
            arrays = await self._catalogue.arrival_arrays(piece, begin, end - 1)
            for name, each in zip(piece, arrays, strict=True):
                if len(each[0]) and len(names) < max_series:
                    names.append(name)
                    found.append(each)
            if len(names) >= max_series:
                break
        if sum(len(minutes) for minutes, _ in found) < _MIN_ACTIVE_MINUTES:
            return None
        return await asyncio.to_thread(history_of, names, [ran, *found], begin, end)

    async def _close(self, report: TrainingReport) -> None:
        self.last = report
        telemetry.count_training(report.outcome)
        try:
            await asyncio.to_thread(self._files.write_training, dataclasses.asdict(report))
        except OSError as error:
            _log.warning("the training's outcome was not written", reason=str(error))


def _report_from(found: dict[str, Any]) -> TrainingReport | None:
    try:
        return TrainingReport(
            float(found["at"]),
            str(found["outcome"]),
            str(found["reason"]),
            *(None if found[name] is None else float(found[name]) for name in _LOSSES),
        )
    except (KeyError, TypeError, ValueError):
        return None


_LOSSES = ("old_loss", "new_loss")
