"""The forecaster's life in a server: restored, told each minute, asked, saved, and trained.

All that computes runs in one thread of its own; training is another process. Whatever fails here is
logged and counted, and the server goes on without forecasts, by the rules that need none.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import dataclasses
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from typing import TypeVar

import structlog

from flashserve import telemetry
from flashserve.config import ForecastSettings
from flashserve.errors import FlashServeError, InputError, UnavailableError
from flashserve.forecast.arrivals import (
    MINUTE_S,
    ArrivalCount,
    ArrivalCounter,
    belongs_to,
    minute_of,
)
from flashserve.forecast.auto import AutoModel, default_candidates
from flashserve.forecast.baselines import Ewma
from flashserve.forecast.core import FollowingModel
from flashserve.forecast.forecaster import Forecaster
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.network.model import NetworkModel
from flashserve.forecast.network.weights import NetworkWeights
from flashserve.forecast.outlook import GRID, Forecast
from flashserve.live.catalogue import Catalogue
from flashserve.live.forecastfiles import ForecastFiles
from flashserve.live.prefetching import HORIZON_S, Prefetcher
from flashserve.live.replay import first_minute, replay
from flashserve.live.runtime import Runtime
from flashserve.live.trainer import Trainer, TrainingReport
from flashserve.messages.events import FORECASTS_PER_EVENT, ForecastReady
from flashserve.types import ModelId, SeriesForecast

LEADS_S = tuple(60.0 * lead for lead in GRID)
_AFTER_S = 0.5
"""A minute is told so long after its end."""
_SAVE_MINUTES = 5
"""What came since is in the catalogue, and is told again after a crash."""
_FIRST_RETRY_S, _LAST_RETRY_S = 60.0, 3600.0
_log = structlog.get_logger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class ForecastStatus:
    """state: off, starting (nothing is forecast yet), ready or failed (tried again later).

    made_at: Unix time from which the forecasts look ahead.
    """

    state: str
    model: str
    made_at: float | None = None
    num_series: int = 0
    num_dropped: int = 0
    reason: str = ""
    training: TrainingReport | None = None


class Forecasting:
    """Owns the forecaster from `run` to `close`; all calls on the event loop.

    Args:
        series: every series that may be forecast now: models, and MODEL:ADAPTER.
        news: arrivals that the forecaster has not been told yet.
        flush: brings what was counted to the catalogue.
        unix_time: the clock that arrivals are counted by.
    """

    def __init__(
        self,
        settings: ForecastSettings,
        runtime: Runtime,
        catalogue: Catalogue,
        files: ForecastFiles,
        series: Callable[[], Sequence[ModelId]],
        news: ArrivalCounter,
        flush: Callable[[], Awaitable[None]],
        prefetcher: Prefetcher,
        trainer: Trainer,
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._runtime = runtime
        self._catalogue = catalogue
        self._files = files
        self._series = series
        self._news = news
        self._flush = flush
        self._prefetcher = prefetcher
        self._trainer = trainer
        self._unix_time = unix_time
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "forecast")
        self._forecaster: Forecaster | None = None
        self._weights: NetworkWeights | None = None
        self._training: asyncio.Task[None] | None = None
        self._saved_minute = 0
        self._failure = ""
        self._retry_at, self._retry_s = 0.0, _FIRST_RETRY_S
        self._sources: dict[tuple[str, str], int] = {}

    # Life

    async def run(self) -> None:
        """Tick just after the end of each minute, until cancelled."""
        await self._trainer.restore()
        while True:
            await self.tick()
            await asyncio.sleep(MINUTE_S - self._unix_time() % MINUTE_S + _AFTER_S)

    async def close(self) -> None:
        """End a training, and write down what is known. Idempotent; `run` has been cancelled."""
        if self._training is not None:
            self._training.cancel()
            await asyncio.gather(self._training, return_exceptions=True)
            self._training = None
        if (forecaster := self._forecaster) is not None:
            self._forecaster = None
            await self._save(forecaster)
        self._thread.shutdown()

    async def tick(self) -> None:
        """Tell the minutes that are over, and the controller what is expected now. Never raises."""
        part = "tick"
        try:
            if self._forecaster is None:
                if self._runtime.clock.now() < self._retry_at:
                    self._news.drain()
                    return
                part = "restore"
                self._forecaster = await self._restored()
                part = "tick"
            await self._tick(self._forecaster)
            self._failure, self._retry_s = "", _FIRST_RETRY_S
        except Exception as error:
            self._fail(part, error)
            return
        self._train_when_due(self._forecaster)

    async def _tick(self, forecaster: Forecaster) -> None:
        counts = self._news.drain()
        if not counts and not len(forecaster):
            return
        began = time.perf_counter()
        adapters = list(self._prefetcher.series())
        now, at = self._unix_time(), self._runtime.clock.now()

        def work() -> tuple[list[SeriesForecast], dict[ModelId, float]]:
            told = _told(forecaster, counts, now)
            self._sources = forecaster.sources()
            return told, _chances(forecaster, adapters)

        told, chances = await self._in_thread(work)
        telemetry.observe_forecast_tick(time.perf_counter() - began)
        # Unix time to the controller's: both clocks were read at one moment.
        made_at = at - (now - forecaster.made_at)
        for first in range(0, len(told), FORECASTS_PER_EVENT):
            piece = told[first : first + FORECASTS_PER_EVENT]
            await self._runtime.apply(
                ForecastReady(tuple(dataclasses.replace(each, made_at=made_at) for each in piece))
            )
        self._prefetch(chances)
        if abs(forecaster.minute - self._saved_minute) >= _SAVE_MINUTES:
            await self._save(forecaster)

    def _prefetch(self, chances: dict[ModelId, float]) -> None:
        try:
            self._prefetcher.ask(chances)
        except FlashServeError as error:
            telemetry.count_forecast_failure("prefetch")
            _log.error("adapters were not brought near", reason=error.message)

    def _fail(self, part: str, error: Exception) -> None:
        """Drop what may be half done; it is restored from what was written, ever less often."""
        telemetry.count_forecast_failure(part)
        self._forecaster = None
        self._sources = {}
        self._failure = error.message if isinstance(error, FlashServeError) else repr(error)
        self._retry_at = self._runtime.clock.now() + self._retry_s
        self._retry_s = min(2 * self._retry_s, _LAST_RETRY_S)
        if isinstance(error, FlashServeError):
            _log.error("the forecaster failed", part=part, reason=error.message)
        else:
            _log.exception("the forecaster failed", part=part)

    # State

    async def _restored(self) -> Forecaster:
        """What was written, or a new one, told everything up to the present minute."""
        await self._flush()
        end = minute_of(self._unix_time())
        series = list(self._series())
        begin = first_minute(end, self._settings.history_days, len(series))
        forecaster = await self._in_thread(lambda: self._read(begin))
        await replay(forecaster, self._catalogue, series, end, self._in_thread)
        known = set(self._series())  # some may have been deleted meanwhile
        await self._in_thread(lambda: forget_others(forecaster, known))
        # What came meanwhile is among the news; what is told already is not told again.
        fresh = [count for count in self._news.drain() if count.minute >= forecaster.minute]
        self._news.restore(fresh)
        self._saved_minute = forecaster.minute
        return forecaster

    def _read(self, begin: int) -> Forecaster:
        """In the thread. A state that cannot be used is logged, and learnt anew from `begin` on."""
        self._weights = self._usable("weights", self._files.read_weights)
        model = self._model(self._weights)

        def read() -> Forecaster | None:
            state = self._files.read_state()
            return None if state is None else Forecaster.from_state(model, state)

        forecaster = self._usable("state", read)
        if forecaster is None or forecaster.minute < begin:
            return Forecaster(model, begin)
        return forecaster

    def _usable(self, what: str, read: Callable[[], T | None]) -> T | None:
        """What was read of a file of ours, which may hold anything after an accident."""
        try:
            return read()
        except Exception as error:
            reason = error.message if isinstance(error, FlashServeError) else repr(error)
            telemetry.count_forecast_failure("restore")
            _log.warning("forecaster file not used", what=what, reason=reason)
            return None

    def _model(self, weights: NetworkWeights | None) -> FollowingModel:
        match self._settings.model:
            case "auto":
                return AutoModel(default_candidates(weights))
            case "hybrid" if weights is not None:
                return NetworkModel(weights)
            case "ewma-15":
                return Ewma(15)
            case _:
                hazard = HazardModel()
                if weights is not None:
                    hazard.pool = weights.pool
                return hazard

    async def _save(self, forecaster: Forecaster) -> None:
        """A state that cannot be written is logged; the old one stays, and is older."""
        try:
            await self._in_thread(lambda: self._files.write_state(forecaster.export_state()))
        except OSError as error:
            telemetry.count_forecast_failure("save")
            _log.error("forecaster state not written", reason=error.strerror or str(error))
        self._saved_minute = forecaster.minute

    # Training

    def _train_when_due(self, forecaster: Forecaster) -> None:
        is_running = self._training is not None and not self._training.done()
        if not is_running and len(forecaster) and self._trainer.is_due():
            self._training = asyncio.create_task(self._train(forecaster.minute), name="training")

    async def _train(self, end: int) -> None:
        weights = await self._trainer.train(list(self._series()), end, self._weights)
        if weights is None:
            return
        try:
            await asyncio.to_thread(self._files.write_weights, weights)
        except OSError as error:
            telemetry.count_forecast_failure("save")
            _log.error("forecaster weights not written", reason=error.strerror or str(error))
            return
        self._weights = weights
        if (forecaster := self._forecaster) is None:
            return
        try:
            await self._in_thread(lambda: forecaster.use(self._model(weights)))
        except InputError:
            # The first weights add a model, whose state of each series is learnt from its history.
            await asyncio.to_thread(self._files.drop_state)
            self._forecaster = None
            self._retry_at = self._runtime.clock.now()

    # Questions

    def status(self) -> ForecastStatus:
        forecaster = self._forecaster
        last = self._trainer.last
        if forecaster is None:
            state = "failed" if self._failure else "starting"
            return ForecastStatus(state, self._settings.model, reason=self._failure, training=last)
        return ForecastStatus(
            "ready",
            self._settings.model,
            forecaster.made_at,
            len(forecaster),
            forecaster.num_dropped,
            training=last,
        )

    def gauges(self) -> telemetry.ForecastGauges:
        if self._forecaster is None:
            return telemetry.ForecastGauges()
        age_s = self._unix_time() - self._forecaster.made_at
        return telemetry.ForecastGauges(age_s, self._sources)

    async def forecasts(self) -> list[Forecast]:
        """Of every series that ever had an arrival, by name; none while there is no forecaster."""
        forecaster = self._forecaster
        if forecaster is None:
            return []

        def read() -> list[Forecast]:
            outlook = forecaster.predict_all(LEADS_S)
            order = sorted(range(len(outlook.names)), key=outlook.names.__getitem__)
            return [outlook.forecast(row) for row in order]

        return await self._in_thread(read)

    async def forecast(self, series: ModelId) -> Forecast:
        """Of one series.

        Raises:
            UnavailableError: there is no forecaster now.
        """
        forecaster = self._forecaster
        if forecaster is None:
            raise UnavailableError(f"nothing is forecast yet: {self._failure or 'starting'}")
        return await self._in_thread(lambda: forecaster.predict(series, LEADS_S))

    async def forget(self, model_id: ModelId) -> None:
        """Drop a series, and those of the adapters of a model."""
        self._news.forget(lambda series: belongs_to(series, model_id))
        if (forecaster := self._forecaster) is None:
            return

        def drop() -> None:
            for name in forecaster.names:
                if belongs_to(ModelId(name), model_id):
                    forecaster.forget(name)

        await self._in_thread(drop)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)


def _told(
    forecaster: Forecaster, counts: Sequence[ArrivalCount], now: float
) -> list[SeriesForecast]:
    """Tell the news and the time; what models are to be expected to do, where it matters."""
    for count in counts:
        forecaster.observe_minute(count.series, count.minute, count.count)
    forecaster.tick(now)
    also = forecaster.told_again(count.series for count in counts)
    return [each for each in forecaster.forecasts(LEADS_S, also) if ":" not in each.series]


def forget_others(forecaster: Forecaster, known: Container[str]) -> None:
    """Drop the series that are not known."""
    for name in forecaster.names:
        if name not in known:
            forecaster.forget(name)


def _chances(forecaster: Forecaster, adapters: Sequence[ModelId]) -> dict[ModelId, float]:
    """P(arrival within HORIZON_S) of those that ever had one."""
    known = [series for series in adapters if series in forecaster]
    if not known:
        return {}
    outlook = forecaster.predict_all([HORIZON_S], known)
    return dict(zip(known, outlook.p_arrival[:, 0].tolist(), strict=True))
