"""What was asked for and what will be: counts of arrivals, and forecasts of them if wanted."""

from __future__ import annotations

import asyncio

from flashserve.config import Settings
from flashserve.errors import UnavailableError
from flashserve.forecast.arrivals import ArrivalCounter, series_of
from flashserve.forecast.outlook import Forecast
from flashserve.live.adapters import Adapters
from flashserve.live.catalogue import Catalogue
from flashserve.live.deployments import Deployments
from flashserve.live.forecastfiles import ForecastFiles
from flashserve.live.forecasting import Forecasting, ForecastStatus
from flashserve.live.names import Names
from flashserve.live.prefetching import Prefetcher
from flashserve.live.recorder import ArrivalRecorder
from flashserve.live.runtime import Runtime
from flashserve.live.trainer import Trainer
from flashserve.live.wallclock import WallClock
from flashserve.telemetry import ForecastGauges
from flashserve.types import ModelId


class Demand:
    """Owns the recorder of arrivals and the forecaster, from `run` to `close`."""

    def __init__(
        self,
        settings: Settings,
        runtime: Runtime,
        catalogue: Catalogue,
        names: Names,
        deployments: Deployments,
        adapters: Adapters,
        clock: WallClock | None = None,
    ) -> None:
        self._settings = settings
        self._deployments = deployments
        self._adapters = adapters
        self._clock = clock or WallClock()
        news = ArrivalCounter() if settings.forecast.enabled else None
        self._recorder = ArrivalRecorder(
            catalogue, names, settings.forecast.retention_days, self._clock, news
        )
        self._forecasting: Forecasting | None = None
        if news is not None:
            self._forecasting = self._make_forecasting(runtime, catalogue, news)

    def _make_forecasting(
        self, runtime: Runtime, catalogue: Catalogue, news: ArrivalCounter
    ) -> Forecasting:
        forecast = self._settings.forecast
        files = ForecastFiles(self._settings.data_dir)
        prefetcher = Prefetcher(
            self._adapters.all,
            self._adapters.prefetch,
            self._settings.prefetch_budget_bytes,
            forecast.prefetch_chance,
        )
        return Forecasting(
            forecast,
            runtime,
            catalogue,
            files,
            self.series,
            news,
            self._recorder.flush,
            prefetcher,
            Trainer(forecast, catalogue, files, self._clock.now),
            self._clock.now,
        )

    def series(self) -> list[ModelId]:
        """What arrivals are counted and forecast by: every model, and every adapter."""
        models = [model.spec.model_id for model in self._deployments.all()]
        return models + [series_of(each.spec.base, each.name) for each in self._adapters.all()]

    def record(self, series: ModelId) -> None:
        """One arrival, now."""
        self._recorder.record(series)

    async def run(self) -> None:
        """Write down and forecast each minute, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._recorder.run(), name="arrivals")
            if self._forecasting is not None:
                tasks.create_task(self._forecasting.run(), name="forecasts")

    async def close(self) -> None:
        """Write down what was counted and learnt. Idempotent; `run` has been cancelled."""
        await self._recorder.flush()
        if self._forecasting is not None:
            await self._forecasting.close()

    async def forget(self, series: ModelId) -> None:
        """A model was deleted, with its adapters, or an adapter was."""
        if self._forecasting is not None:
            await self._forecasting.forget(series)

    def status(self) -> ForecastStatus:
        """How the forecaster is."""
        if self._forecasting is None:
            return ForecastStatus("off", self._settings.forecast.model)
        return self._forecasting.status()

    def gauges(self) -> ForecastGauges:
        return self._forecasting.gauges() if self._forecasting else ForecastGauges()

    async def forecasts(self) -> list[Forecast]:
        """What is expected of every series that ever had an arrival, by name."""
        return await self._forecasting.forecasts() if self._forecasting else []

    async def forecast(self, name: str) -> Forecast:
        """What is expected of a model, or of an adapter (NAME or MODEL:NAME).

        Raises:
            ModelNotFoundError: it names those that are close.
            UnavailableError: there are no forecasts now, and why.
        """
        model, adapter = self._adapters.resolve(name)
        if self._forecasting is None:
            raise UnavailableError("nothing is forecast: forecast.enabled is off")
        model_id = model.spec.model_id
        return await self._forecasting.forecast(
            series_of(model_id, adapter.name) if adapter else model_id
        )
