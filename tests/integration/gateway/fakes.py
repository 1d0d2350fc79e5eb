"""A service that plays a script, and a real HTTP server over it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx
import uvicorn
import uvloop

from flashserve.config import Settings
from flashserve.control.ledger import Series
from flashserve.control.usage import WorkerUsage
from flashserve.errors import ConflictError, ModelNotFoundError, SourceError
from flashserve.forecast.outlook import Forecast
from flashserve.gateway.app import create_app
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.forecasting import ForecastStatus
from flashserve.live.requests import (
    AdapterStatus,
    Decision,
    GenerationRequest,
    ModelStatus,
    Receipt,
    TextChunk,
    TokenLogprob,
    Usage,
)
from flashserve.live.savingsreport import Report, make_report
from flashserve.live.usagerows import Accounts, Compared
from flashserve.policy.cost import Prices
from flashserve.policy.schedules import NO_BOUNDS, Bounds
from flashserve.store.guard import ScrubReport
from flashserve.store.reporting import ArenaReport, StoreReport, TierReport
from flashserve.store.transfers import Fetch
from flashserve.telemetry import ForecastGauges
from flashserve.types import AdapterSpec, KVUsage, ModelId, NodeId, Phases, RequestId, Tier

MODEL = "team/tiny"
REPORT = StoreReport(
    dram=TierReport(1000, 600, 400, 2, 1, 5, 1),
    disk=TierReport(9000, 6000, 3000, 3, 0, 4, 0),
    arena=ArenaReport(1200, 800, True, 200, (), ("huge pages: refused",)),
    scrub=ScrubReport(100, 50, 600, 3, 12.5),
    fetches=(Fetch(ModelId(MODEL), "s3://bucket/tiny", Tier.REMOTE, Tier.DRAM, 30, 90, 2.0, 15.0),),
    read_bytes={Tier.REMOTE: 700, Tier.DISK: 70},
)
Plan = Callable[[GenerationRequest], AsyncIterator[TextChunk]]


def chunk(
    text: str, *, choice: int = 0, finish: str | None = None, num_tokens: int = 1
) -> TextChunk:
    return TextChunk(choice, text, num_tokens, None, finish, time.monotonic())


async def greet(request: GenerationRequest) -> AsyncIterator[TextChunk]:
    """ "Hello world!" in three pieces for each choice, the choices interleaved."""
    for text, finish in (("Hello", None), (" world", None), ("!", "stop")):
        for choice in range(request.num_choices):
            logprobs = (logprob(text, request.params.logprobs),)
            piece = chunk(text, choice=choice, finish=finish)
            if request.params.logprobs is not None:
                piece = dataclasses.replace(piece, logprobs=logprobs)
            yield piece


def logprob(text: str, num_top: int | None) -> TokenLogprob:
    top = tuple((f"{text}{i}", f"{text}{i}".encode(), -1.0 - i) for i in range(num_top or 0))
    return TokenLogprob(text, text.encode(), -0.5, top)


def failing(error: Exception, after: tuple[str, ...] = ()) -> Plan:
    async def plan(request: GenerationRequest) -> AsyncIterator[TextChunk]:
        for text in after:
            yield chunk(text)
        raise error

    return plan


class FakeGeneration:
    def __init__(self, request: GenerationRequest, plan: Plan, predicted: Phases) -> None:
        self.receipt = Receipt(
            RequestId("r-1"),
            request.model_id,
            Tier.DRAM,
            True,
            predicted,
            Phases(queue_s=0.25, dram_s=0.5, prefill_s=0.125),
            gateway_in_s=0.001,
            reason="it was asked for",
        )
        self.predicted = predicted
        self.usage = Usage(7, 0, 2)
        self.is_closed = threading.Event()
        self._chunks = plan(request)

    def __aiter__(self) -> FakeGeneration:
        return self

    async def __anext__(self) -> TextChunk:
        piece = await anext(self._chunks)
        self.usage = dataclasses.replace(
            self.usage, completion_tokens=self.usage.completion_tokens + piece.num_tokens
        )
        return piece

    async def aclose(self) -> None:
        await self._chunks.aclose()
        self.is_closed.set()


FORECAST = Forecast(
    series=f"{MODEL}:shout",
    made_at=1_790_000_040.0,
    leads_s=(60.0, 300.0),
    p_arrival=(0.25, 0.5),
    mean=(0.3, 1.5),
    quantiles=((0.0, 0.0, 1.0, 2.0), (0.0, 1.0, 3.0, 5.0)),
    components={"hazard": 0.25},
    model="hazard",
    why="cheapest for this series",
)


class FakeDemand:
    """Forecasts one series."""

    def status(self) -> ForecastStatus:
        return ForecastStatus("ready", "auto", FORECAST.made_at, 1)

    def gauges(self) -> ForecastGauges:
        return ForecastGauges(12.5, {("hazard", "cheapest for this series"): 1})

    async def forecasts(self) -> list[Forecast]:
        return [FORECAST]

    async def forecast(self, name: str) -> Forecast:
        if name != FORECAST.series:
            raise ModelNotFoundError(f"model {name} is not deployed; deployed: {MODEL}")
        return FORECAST


class FakeSavings:
    """One model that acme used for a while."""

    def __init__(self) -> None:
        self.since_start = Accounts(
            usage={
                Series(ModelId(MODEL), "", "acme"): WorkerUsage(30.0, 2.0, 60.0, 2.0, 3, 1, 1),
                Series(ModelId(MODEL), "", ""): WorkerUsage(5.0, requests=1),
            },
            compared={("always-on", ModelId(MODEL)): Compared(WorkerUsage(idle_s=500.0, cold=4))},
        )

    def gather(self) -> None:
        pass

    async def report(self, num_days: int) -> Report:
        first_day = 20_000 - num_days + 1
        return make_report(self.since_start, "flashserve", Prices(), first_day, {})


class FakeService:
    """plan: what each generation plays; refusal: raised by submit and deploy instead."""

    def __init__(self) -> None:
        self.demand = FakeDemand()
        self.reset()

    def reset(self) -> None:
        self.plan: Plan = greet
        self.refusal: Exception | None = None
        self.predicted = Phases(dram_s=40.0)
        self.is_ready = True
        self.draining = False
        self.requests: list[GenerationRequest] = []
        self.generations: list[FakeGeneration] = []
        self.calls: list[tuple[object, ...]] = []
        self.statuses = {MODEL: status(MODEL)}
        self.savings = FakeSavings()
        self.registry: dict[str, RegisteredAdapter] = {}
        self.was_submitted = threading.Event()

    async def submit(self, request: GenerationRequest) -> FakeGeneration:
        self.model(request.model_id)
        if self.refusal is not None:
            raise self.refusal
        self.requests.append(request)
        generation = FakeGeneration(request, self.plan, self.predicted)
        self.generations.append(generation)
        self.was_submitted.set()
        return generation

    def model_names(self) -> list[str]:
        return list(self.statuses)

    def model(self, name: str) -> ModelStatus:
        if name not in self.statuses:
            deployed = ", ".join(self.statuses)
            raise ModelNotFoundError(f"no model {name!r}; deployed: {deployed}", param="model")
        return self.statuses[name]

    async def models(self) -> list[ModelStatus]:
        return list(self.statuses.values())

    async def tiers(self) -> dict[NodeId, StoreReport]:
        return {NodeId("local"): REPORT}

    async def deploy(
        self,
        name: str,
        source: str,
        *,
        keep_alive_s: float | None = None,
        bounds: Bounds = NO_BOUNDS,
        trusted: bool,
        replace: bool = False,
    ) -> ModelStatus:
        self.calls.append(("deploy", name, source, keep_alive_s, bounds, trusted, replace))
        if source == "/missing":
            raise SourceError("/missing: no such directory")
        if name in self.statuses and not replace:
            raise ConflictError(f"{name} is deployed")
        self.statuses[name] = status(name)
        return self.statuses[name]

    async def delete(self, name: str) -> None:
        self.model(name)
        del self.statuses[name]

    def registered(self) -> list[RegisteredAdapter]:
        return list(self.registry.values())

    async def adapters(self) -> list[AdapterStatus]:
        return [adapter_status(each) for each in self.registered()]

    async def add_adapter(
        self, base: str, name: str, source: str, *, trusted: bool, replace: bool = False
    ) -> AdapterStatus:
        self.calls.append(("add_adapter", base, name, source, trusted, replace))
        self.model(base)
        if self.refusal is not None:
            raise self.refusal
        self.registry[name] = registered(base, name, source)
        return adapter_status(self.registry[name])

    async def remove_adapter(self, name: str) -> None:
        if name not in self.registry:
            raise ModelNotFoundError(f"there is no adapter {name}", param="name")
        del self.registry[name]

    async def stage(self, name: str, tier: Tier) -> ModelStatus:
        self.calls.append(("stage", name, tier))
        return self.model(name)

    async def evict(self, name: str, tier: Tier) -> ModelStatus:
        self.calls.append(("evict", name, tier))
        return self.model(name)

    def decisions(self, limit: int = 100) -> list[Decision]:
        made = [
            Decision(1.5 + i, "start_replica", ModelId(MODEL), "local", "due") for i in range(3)
        ]
        return made[:limit]


def registered(base: str, name: str, source: str) -> RegisteredAdapter:
    spec = AdapterSpec(name, 1, ModelId(base), source, 4096, "id-1")
    return RegisteredAdapter(spec, 8, 1024, ("q_proj", "v_proj"), 1700000000.5)


def adapter_status(adapter: RegisteredAdapter) -> AdapterStatus:
    spec = adapter.spec
    return AdapterStatus(
        name=spec.name,
        base=spec.base,
        version=spec.version,
        source=spec.source,
        rank=adapter.rank,
        num_parameters=adapter.num_parameters,
        targets=adapter.targets,
        size_bytes=spec.size_bytes,
        tier=Tier.DRAM,
        dram_bytes=4096,
        in_flight=0,
        requests=3,
        tokens=40,
        last_used_s=1.5,
        advice="multiplex",
        reason="seen for 0 of 10 minutes",
        created_at=adapter.created_at,
    )


def status(name: str) -> ModelStatus:
    return ModelStatus(
        name=name,
        source="demo:smollm2",
        state="cold",
        tier=Tier.DRAM,
        replicas=0,
        in_flight=1,
        waiting=2,
        size_bytes=300,
        dram_bytes=200,
        last_used_s=None,
        keep_alive_s=300.0,
        reason="nobody asked",
        context_tokens=512,
        architecture="LlamaForCausalLM",
        created_at=1_700_000_000.0,
        kv=KVUsage(total=10, used=3, cached=2, free=5),
    )


@dataclasses.dataclass(frozen=True)
class Running:
    service: FakeService
    url: str
    socket_path: Path
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[[], object]) -> None:
        """Run `function` on the server's loop, where asyncio's events may be set."""
        self.loop.call_soon_threadsafe(function)

    def client(self, **options: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **options)

    def trusted_client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.socket_path))
        return httpx.Client(transport=transport, base_url="http://anything", timeout=30)


@contextlib.contextmanager
def running(service: FakeService, settings: Settings, directory: Path) -> Iterator[Running]:
    """A uvicorn server in a thread, on a free loopback port and a Unix socket."""
    tcp = socket.socket()
    tcp.bind(("127.0.0.1", 0))
    unix = socket.socket(socket.AF_UNIX)
    path = directory / "s.sock"
    unix.bind(str(path))
    config = uvicorn.Config(
        create_app(service, settings), log_config=None, access_log=False, lifespan="off"
    )
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def serve() -> None:
        loops.append(asyncio.get_running_loop())
        await server._serve([tcp, unix])

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield Running(service, f"http://127.0.0.1:{tcp.getsockname()[1]}", path, loops[0])
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive(), "the server did not stop"
        tcp.close()
        unix.close()
