"""The forecaster over the real controller, runtime and catalogue, with clocks moved by hand."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import structlog
from tests.unit.forecast.network.test_network import drawn_weights

from flashserve.config import ForecastSettings, PolicySettings
from flashserve.control.controller import Controller
from flashserve.errors import CatalogueError, InputError, UnavailableError
from flashserve.forecast.arrivals import ArrivalCount, ArrivalCounter, series_of
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.arrivalrows import SERVER
from flashserve.live.catalogue import Catalogue
from flashserve.live.forecastfiles import ForecastFiles
from flashserve.live.forecasting import LEADS_S, Forecasting
from flashserve.live.names import Names
from flashserve.live.prefetching import Prefetcher
from flashserve.live.recorder import ArrivalRecorder
from flashserve.live.runtime import MonotonicClock, Runtime
from flashserve.live.trainer import Trainer
from flashserve.live.training import Trained
from flashserve.live.wallclock import WallClock
from flashserve.messages.events import ForecastReady, ModelDeployed
from flashserve.types import AdapterSpec, ModelId, ModelSpec, SeriesForecast

pytestmark = pytest.mark.integration
A, B = ModelId("a"), ModelId("b")
ADAPTED = series_of(A, "x")
START = 1_790_000_000 // 60 * 60.0


class HandClock(MonotonicClock):
    """The controller's clock, moved by hand."""

    def __init__(self) -> None:
        self.at = 1000.0

    def now(self) -> float:
        return self.at


@contextlib.contextmanager
def told_logs() -> Iterator[list[Any]]:
    """What an operator sees of it, filled in at the end: the runtime's debugging left out."""
    seen: list[Any] = []
    with structlog.testing.capture_logs() as logs:
        yield seen
    seen += [line for line in logs if line["log_level"] != "debug"]


class Bench:
    """One server's life: `wall` and the controller's clock go on together unless moved apart."""

    def __init__(self, tmp_path: Path, catalogue: Catalogue, **settings: Any) -> None:
        self.catalogue, self.clock, self.wall = catalogue, HandClock(), START
        self.runtime = Runtime(Controller(PolicySettings()), [], clock=self.clock)
        self.names, self.news = Names(), ArrivalCounter()
        self.series = [A, B, ADAPTED]
        for name in ("a", "b", "x"):
            self.names.put(name, "model")
        wall = WallClock(lambda: self.wall, self.clock.now)
        self.recorder = ArrivalRecorder(catalogue, self.names, 28, wall, self.news)
        self.files = ForecastFiles(tmp_path)
        self.prefetched: list[str] = []
        self.trained: list[Trained | Exception] = []
        forecast = ForecastSettings(**settings)
        adapter = RegisteredAdapter(AdapterSpec("x", 1, A, "/x", 1 << 20), 8, 1, (), 0.0)
        self.forecasting = Forecasting(
            forecast,
            self.runtime,
            catalogue,
            self.files,
            lambda: self.series,
            self.news,
            self.recorder.flush,
            Prefetcher(lambda: [adapter], self.prefetched.append, 1 << 21, 0.5),
            Trainer(forecast, catalogue, self.files, lambda: self.wall, self._tune),
            lambda: self.wall,
        )
        self.events: list[ForecastReady] = []

    async def _tune(self, *_: object) -> Trained:
        what = self.trained.pop(0)
        if isinstance(what, Exception):
            raise what
        return what

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.clock.at += seconds

    async def minute(self, *arrivals: ModelId) -> dict[str, SeriesForecast]:
        """Arrivals in the middle of a minute, and the tick at its end; what was told of it."""
        self.wait(30)
        for series in arrivals:
            self.recorder.record(series)
        self.wait(30)
        await self.recorder.flush()
        return await self.tick()

    async def tick(self) -> dict[str, SeriesForecast]:
        with self.runtime.watch() as handled:
            await self.forecasting.tick()
            events = [handled.get_nowait()[0] for _ in range(handled.qsize())]
        self.events = [event for event in events if isinstance(event, ForecastReady)]
        return {each.series: each for event in self.events for each in event.forecasts}

    async def timer(self, num_rounds: int, period: int = 5) -> None:
        """A request for A on every `period`-th minute, and for its adapter on every minute."""
        for minute in range(num_rounds * period):
            await self.minute(*([A] if minute % period == 0 else []), ADAPTED)


@contextlib.asynccontextmanager
async def bench(tmp_path: Path, **settings: Any) -> AsyncIterator[Bench]:
    catalogue = Catalogue(tmp_path)
    await catalogue.open()
    made = Bench(tmp_path, catalogue, **settings)
    await made.runtime.start()
    for name in (A, B):
        await made.runtime.apply(ModelDeployed(ModelSpec(name, f"/{name}", 1)))
    try:
        yield made
    finally:
        await made.forecasting.close()
        await made.runtime.close()
        await catalogue.close()


def play(tmp_path: Path, scenario: Callable[[Bench], Awaitable[None]], **settings: Any) -> None:
    async def run() -> None:
        async with bench(tmp_path, **settings) as made:
            await scenario(made)

    asyncio.run(run())


def model_forecast(bench: Bench, name: ModelId) -> SeriesForecast | None:
    model = bench.runtime.controller._state.find(name)
    assert model is not None
    return model.forecast.said if model.forecast else None


# Telling and asking


def test_the_controller_hears_of_models_in_its_own_time(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        told = await bench.minute(A, ADAPTED)
        assert set(told) == {A}
        bench.wait(0.5)
        assert (await bench.minute(A))[A].made_at == bench.clock.at - 0.5
        forecast = model_forecast(bench, A)
        assert forecast is not None
        assert forecast.leads_s == LEADS_S
        assert 0 < forecast.p_arrival[0] <= forecast.p_arrival[-1] <= 1
        assert forecast.source

    play(tmp_path, scenario)


def test_a_model_without_requests_is_not_told_and_an_idle_server_computes_nothing(
    tmp_path: Path,
) -> None:
    async def scenario(bench: Bench) -> None:
        for _ in range(3):
            assert await bench.minute() == {}
        assert bench.forecasting.status().num_series == 0
        assert bench.events == []

    play(tmp_path, scenario)


def test_many_forecasts_come_in_several_events(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        names = [ModelId(f"m{number}") for number in range(450)]
        for name in names:
            bench.names.put(name, "model")
        bench.series = names
        told = await bench.minute(*names)
        assert set(told) == set(names)
        assert [len(event.forecasts) for event in bench.events] == [*[8] * 56, 2]

    play(tmp_path, scenario)


def test_a_forecast_that_does_not_change_is_told_again_before_it_is_old(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.timer(6)
        told = [A in await bench.minute() for _ in range(40)]
        assert all(any(told[first : first + 10]) for first in range(30))

    play(tmp_path, scenario)


def test_an_adapter_that_is_likely_to_be_asked_for_is_brought_near(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.minute(B)
        assert bench.prefetched == []
        await bench.timer(6)
        assert set(bench.prefetched) == {ADAPTED}

    play(tmp_path, scenario)


def test_a_prefetch_that_fails_costs_no_forecast(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.timer(6)

        def refuse(_: str) -> None:
            raise UnavailableError("no node")

        bench.forecasting._prefetcher._prefetch = refuse  # type: ignore[assignment]
        assert A in await bench.minute(A, ADAPTED)
        assert bench.forecasting.status().state == "ready"

    play(tmp_path, scenario)


def test_what_is_deleted_is_forecast_no_more(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.minute(A, B, ADAPTED)
        bench.recorder.record(ADAPTED)
        await bench.forecasting.forget(A)
        assert [each.series for each in await bench.forecasting.forecasts()] == [B]
        assert set(await bench.minute(B)) == {B}
        assert [each.series for each in await bench.forecasting.forecasts()] == [B]

    play(tmp_path, scenario)


# Restarts


async def learnt(tmp_path: Path, *, closed: bool) -> tuple[float, ...]:
    """What is expected of A after half an hour of a timer; then the server stops, or is killed."""
    async with bench(tmp_path) as made:
        await made.timer(6)
        expected = (await made.forecasting.forecast(A)).p_arrival
        if not closed:
            made.forecasting._forecaster = None  # a killed server writes nothing more
        return expected


async def after_restart(tmp_path: Path) -> tuple[tuple[float, ...], list[Any]]:
    """What is expected of A by a server that starts right after the half hour, and its log."""
    async with bench(tmp_path) as made:
        made.wait(30 * 60)
        with told_logs() as logs:
            await made.forecasting.tick()
        assert made.forecasting.status().state == "ready"
        return (await made.forecasting.forecast(A)).p_arrival, logs


@pytest.mark.parametrize("closed", [True, False])
def test_a_restart_loses_nothing_that_was_written(tmp_path: Path, closed: bool) -> None:
    expected = asyncio.run(learnt(tmp_path, closed=closed))
    found, logs = asyncio.run(after_restart(tmp_path))
    assert found == pytest.approx(expected, rel=1e-6)
    assert logs == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-500]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes().replace(b"version", b"vErsion")),
        lambda path: flip(path, len(path.read_bytes()) // 2),
        lambda path: np.savez(path, version=99, model="hazard"),
        lambda path: path.write_bytes(b"\x93NUMPY\x01\x00"),
        lambda path: path.write_bytes(npy()),
    ],
)
def test_a_state_that_cannot_be_used_is_learnt_anew_from_the_catalogue(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    expected = asyncio.run(learnt(tmp_path, closed=True))
    damage(ForecastFiles(tmp_path).state_path)
    found, logs = asyncio.run(after_restart(tmp_path))
    # The minute before the first request is not in the catalogue as one that was watched.
    assert found == pytest.approx(expected, rel=1e-3)
    assert [line["event"] for line in logs] == ["forecaster file not used"]
    assert logs[0]["what"] == "state"
    assert "\n" not in logs[0]["reason"]


def npy() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def test_arrivals_that_came_while_the_forecaster_learnt_are_told_once(tmp_path: Path) -> None:
    asyncio.run(learnt(tmp_path, closed=True))

    async def run() -> None:
        async with bench(tmp_path) as made:
            made.wait(31 * 60)
            made.recorder.record(A)
            made.recorder.record(A)
            await made.forecasting.tick()
            made.wait(60)
            await made.forecasting.tick()
            forecaster = made.forecasting._forecaster
            assert forecaster is not None
            assert not list(forecaster._pending.entries())

    asyncio.run(run())


def test_a_model_that_was_deleted_while_no_server_ran_is_forgotten(tmp_path: Path) -> None:
    asyncio.run(learnt(tmp_path, closed=True))

    async def run() -> None:
        async with bench(tmp_path) as made:
            made.series = [B]
            made.wait(30 * 60)
            await made.forecasting.tick()
            assert await made.forecasting.forecasts() == []

    asyncio.run(run())


# Clocks


def test_a_clock_that_jumps_a_day_and_back_leaves_forecasts_that_are_used(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.timer(6)
        before = await bench.forecasting.forecast(A)
        for jump in (86400.0, -86400.0):
            bench.wall += jump
            told = await bench.minute(A)
            assert told[A].made_at == pytest.approx(bench.clock.at)
            status = bench.forecasting.status()
            assert status.state == "ready"
            assert status.made_at == pytest.approx(bench.wall)
        after = await bench.forecasting.forecast(A)
        assert all(map(np.isfinite, after.p_arrival))
        assert after.p_arrival[4] > 0.5 * before.p_arrival[4]

    play(tmp_path, scenario)


def test_a_machine_that_was_asleep_goes_on_from_what_it_knew(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.timer(6)
        bench.wall += 6 * 3600  # the monotonic clock stands still meanwhile
        told = await bench.minute(A)
        assert told[A].made_at == pytest.approx(bench.clock.at)

    play(tmp_path, scenario)


# Failures


def test_a_forecaster_that_fails_is_restored_later_and_harms_nobody(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.timer(6)
        forecaster = bench.forecasting._forecaster
        assert forecaster is not None
        forecaster._follower.advance = None  # type: ignore[assignment]
        with told_logs() as logs:
            assert await bench.minute(A) == {}
        assert [line["event"] for line in logs] == ["the forecaster failed"]
        assert bench.forecasting.status().state == "failed"
        assert bench.runtime.is_healthy
        with pytest.raises(UnavailableError, match="nothing is forecast yet"):
            await bench.forecasting.forecast(A)
        told = [await bench.minute(A) for _ in range(3)][-1]
        assert A in told
        assert bench.forecasting.status().state == "ready"
        assert bench.forecasting.status().reason == ""

    play(tmp_path, scenario)


def test_a_catalogue_that_cannot_be_read_leaves_the_server_without_forecasts(
    tmp_path: Path,
) -> None:
    async def scenario(bench: Bench) -> None:
        async def refuse(*_: object) -> Any:
            raise CatalogueError("catalogue.sqlite: disk I/O error")

        read = bench.catalogue.arrival_arrays
        bench.catalogue.arrival_arrays = refuse  # type: ignore[method-assign]
        with told_logs() as logs:
            assert await bench.minute(A) == {}
        assert [line["reason"] for line in logs] == ["catalogue.sqlite: disk I/O error"]
        bench.catalogue.arrival_arrays = read  # type: ignore[method-assign]
        await bench.minute()
        assert A in await bench.minute(A)

    play(tmp_path, scenario)


def test_a_state_that_cannot_be_written_is_logged_and_forecasts_go_on(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await bench.minute(A)
        bench.files.state_path.parent.write_text("a file is in the way")
        with told_logs() as logs:
            for _ in range(7):
                assert A in await bench.minute(A)
        assert {line["event"] for line in logs} == {"forecaster state not written"}

    play(tmp_path, scenario)


# Training


async def with_history(bench: Bench, num_minutes: int = 1450) -> None:
    """Requests for A and B every other minute: enough for a training."""
    now = int(START // 60)
    minutes = range(now - num_minutes, now)
    ran = [ArrivalCount(SERVER, minute, 1) for minute in minutes]
    came = [ArrivalCount(name, minute, 1) for minute in minutes[::2] for name in (A, B)]
    await bench.catalogue.add_arrivals([*ran, *came])


async def train(bench: Bench, outcome: Trained | Exception) -> list[Any]:
    """The log of a tick that begins a training, and of its end."""
    bench.trained.append(outcome)
    with told_logs() as logs:
        await bench.minute(A)
        assert bench.forecasting._training is not None
        await bench.forecasting._training
    return logs


def sources(bench: Bench) -> set[str]:
    return {model for model, _ in bench.forecasting.gauges().num_series}


def test_better_weights_are_used_written_and_used_after_a_restart(tmp_path: Path) -> None:
    weights = drawn_weights()

    async def scenario(bench: Bench) -> None:
        await with_history(bench)
        logs = await train(bench, Trained(weights, old_loss=0.5, new_loss=0.4))
        assert [line["event"] for line in logs] == [
            "training the forecaster",
            "trained the forecaster",
        ]
        await bench.minute(A)
        assert sources(bench) == {"hybrid"}
        status = bench.forecasting.status()
        assert status.training is not None
        assert status.training.outcome == "taken"

    async def restarted(bench: Bench) -> None:
        bench.wait(120)
        await bench.forecasting._trainer.restore()
        await bench.tick()
        assert sources(bench) == {"hybrid"}
        assert bench.forecasting._training is None

    play(tmp_path, scenario, model="hybrid")
    play(tmp_path, restarted, model="hybrid")


def test_later_weights_take_over_without_learning_anew(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await with_history(bench)
        await train(bench, Trained(drawn_weights(), 0.5, 0.4))
        await bench.minute(A)
        forecaster = bench.forecasting._forecaster
        bench.wait(24 * 3600)
        await train(bench, Trained(drawn_weights(seed=1), 0.4, 0.3))
        assert bench.forecasting._forecaster is forecaster
        assert A in await bench.minute(A)

    play(tmp_path, scenario, model="hybrid")


@pytest.mark.parametrize(
    ("outcome", "word"),
    [
        (UnavailableError("its process ended with signal 9"), "failed"),
        (InputError("weights.npz: gate_bias is damaged"), "failed"),
        (OSError(28, "No space left on device"), "failed"),
        (Trained(drawn_weights(), 0.4, 0.5), "no_better"),
        (Trained(drawn_weights(), 0.4, float("nan")), "no_better"),
    ],
)
def test_a_training_that_fails_changes_nothing_but_the_log(
    tmp_path: Path, outcome: Trained | Exception, word: str
) -> None:
    async def scenario(bench: Bench) -> None:
        await with_history(bench)
        logs = await train(bench, outcome)
        assert len(logs) == 2
        status = bench.forecasting.status()
        assert status.training is not None
        assert status.training.outcome == word
        assert not bench.files.weights_path.exists()
        assert A in await bench.minute(A)
        assert sources(bench) == {"hazard"}
        # The next one is due a day later, also after a restart.
        assert bench.forecasting._training is not None
        assert bench.forecasting._training.done()

    async def restarted(bench: Bench) -> None:
        bench.wait(3 * 3600)
        await bench.forecasting._trainer.restore()
        await bench.tick()
        assert bench.forecasting._training is None

    play(tmp_path, scenario, model="hazard")
    play(tmp_path, restarted, model="hazard")


@pytest.mark.parametrize("settings", [{"training": False}, {}])
def test_nothing_is_trained_when_that_is_off_or_there_is_too_little(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    async def scenario(bench: Bench) -> None:
        await with_history(bench, 1450 if settings else 1400)
        await bench.minute(A)
        if bench.forecasting._training is not None:
            await bench.forecasting._training
        assert bench.forecasting.status().training is None

    play(tmp_path, scenario, model="hazard", **settings)


def test_damaged_weights_are_left_and_told_in_one_line(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.files.state_path.parent.mkdir()
        bench.files.weights_path.write_bytes(b"no weights")
        with told_logs() as logs:
            assert A in await bench.minute(A)
        assert [(line["event"], line["what"]) for line in logs] == [
            ("forecaster file not used", "weights")
        ]
        assert sources(bench) == {"hazard"}

    play(tmp_path, scenario, model="hazard")


def test_the_end_of_the_server_ends_a_training(tmp_path: Path) -> None:
    async def run() -> None:
        async with bench(tmp_path, model="hazard") as made:
            await with_history(made)
            began = asyncio.Event()

            async def tune(*_: object) -> Trained:
                began.set()
                await asyncio.Event().wait()
                raise AssertionError

            made.forecasting._trainer._tune = tune
            await made.minute(A)
            await began.wait()

    asyncio.run(run())
