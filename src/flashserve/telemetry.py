"""What a running server tells its operators: structured logs, and metrics for Prometheus.

Any layer above may call the functions here; nothing here calls back. Metrics live in a registry of
our own, so that a library which fills the global one adds nothing to ours. Labels are bounded: the
names of deployed models, phases, tiers, states, and the codes of errors.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flashserve.types import KVUsage, Phases, Tier

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
    120.0,
)
_FAST_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1.0)
_COLD_PHASES = ("place", "fetch", "dram", "device", "init")


@dataclasses.dataclass(frozen=True, slots=True)
class Family:
    """A metric whose values others count, such as the nodes."""

    name: str
    text: str
    labels: tuple[str, ...] = ()
    is_counter: bool = False


_registry = CollectorRegistry()
_ttft = Histogram(
    "flashserve_ttft_seconds",
    "Request in to the first token written to the socket.",
    ("model", "start"),
    buckets=_SECONDS,
    registry=_registry,
)
_tpot = Histogram(
    "flashserve_tpot_seconds",
    "Time per output token after the first.",
    ("model",),
    buckets=_SECONDS,
    registry=_registry,
)
_queue = Histogram(
    "flashserve_queue_seconds",
    "Wait for a slot or behind other requests.",
    ("model",),
    buckets=_SECONDS,
    registry=_registry,
)
_cold_phase = Histogram(
    "flashserve_cold_start_phase_seconds",
    "Phases of the start that a request waited for, once per request.",
    ("model", "phase"),
    buckets=_SECONDS,
    registry=_registry,
)
_gateway = Histogram(
    "flashserve_gateway_seconds",
    "Time that the gateway adds: in (request to engine), out (token to socket).",
    ("direction",),
    buckets=_FAST_SECONDS,
    registry=_registry,
)
_requests = Counter(
    "flashserve_requests",
    "Generation requests by how they ended: ok, aborted, or an error's code.",
    ("model", "outcome"),
    registry=_registry,
)
_cold_requests = Counter(
    "flashserve_cold_requests",
    "Requests that waited for a start, by the tier that held the bytes.",
    ("model", "tier"),
    registry=_registry,
)
_tokens = Counter(
    "flashserve_tokens",
    "Tokens by kind: prompt, cached (the part of prompt that was reused), completion.",
    ("model", "kind"),
    registry=_registry,
)
_responses = Counter(
    "flashserve_http_responses", "HTTP responses by status.", ("status",), registry=_registry
)
_in_flight = Gauge(
    "flashserve_in_flight", "Requests dispatched to a replica.", ("model",), registry=_registry
)
_waiting = Gauge(
    "flashserve_waiting", "Requests waiting for a dispatch.", ("model",), registry=_registry
)
_replicas = Gauge("flashserve_replicas", "Ready replicas.", ("model",), registry=_registry)
_dram = Gauge(
    "flashserve_dram_bytes", "Bytes held in the DRAM arena.", ("model",), registry=_registry
)
_kv = Gauge(
    "flashserve_kv_blocks",
    "KV blocks of a model's replicas by state: used, cached, free.",
    ("model", "state"),
    registry=_registry,
)
_forecast_tick = Histogram(
    "flashserve_forecast_tick_seconds",
    "What telling a minute to the forecaster and asking it takes.",
    buckets=_SECONDS,
    registry=_registry,
)
_forecast_failures = Counter(
    "flashserve_forecast_failures",
    "What failed of the forecaster: restore, tick, save, prefetch.",
    ("part",),
    registry=_registry,
)
_trainings = Counter(
    "flashserve_forecast_trainings",
    "Trainings of the network by outcome: taken, no_better, failed.",
    ("outcome",),
    registry=_registry,
)
_forecast_age = Gauge(
    "flashserve_forecast_age_seconds",
    "Time since the end of the last minute that the forecasts know of.",
    registry=_registry,
)
_forecast_series = Gauge(
    "flashserve_forecast_series",
    "Series by the model that forecasts them, and why that one.",
    ("model", "why"),
    registry=_registry,
)
_TIERS = (
    Family(
        "flashserve_tier_bytes", "Bytes of a node's tier by state: used, free.", ("tier", "state")
    ),
    Family("flashserve_tier_models", "Models that are whole in a tier.", ("tier",)),
    Family("flashserve_tier_leases", "Who keeps bytes from leaving a tier.", ("tier",)),
    Family("flashserve_tier_evictions", "Models that left a tier.", ("tier",), is_counter=True),
    Family(
        "flashserve_tier_damaged",
        "Chunks in DRAM, or checkpoints on disk, that were found damaged.",
        ("tier",),
        is_counter=True,
    ),
    Family("flashserve_read_bytes", "Bytes read from a tier.", ("tier",), is_counter=True),
    Family("flashserve_fetches", "Reads towards a tier that are under way.", ("tier",)),
    Family("flashserve_arena_prefaulted_bytes", "Memory taken from the kernel ahead of need."),
    Family("flashserve_arena_huge_page_bytes", "Memory of the arena in huge pages."),
    Family("flashserve_scrub_rounds", "Rounds of the scrub through DRAM.", is_counter=True),
)
_USAGE = (
    Family(
        "flashserve_worker_seconds",
        "Seconds of workers that a model took, by state: busy, loading, idle.",
        ("model", "state"),
        is_counter=True,
    ),
    Family(
        "flashserve_tenant_worker_seconds",
        "The same by tenant; * is what was started ahead of requests and used by nobody yet.",
        ("tenant", "state"),
        is_counter=True,
    ),
    Family(
        "flashserve_shadow_worker_seconds",
        "Seconds of workers that another policy would have taken, by state.",
        ("policy", "state"),
    ),
    Family(
        "flashserve_shadow_cold_requests",
        "Requests that would have waited for a start under another policy.",
        ("policy",),
    ),
)
_BY_MODEL = (_ttft, _tpot, _queue, _cold_phase, _requests, _cold_requests, _tokens)
_GAUGES = (_in_flight, _waiting, _replicas, _dram, _kv)


@dataclasses.dataclass(frozen=True, slots=True)
class ServedRequest:
    """One generation request as the metrics see it, complete or not.

    Times are seconds and None where the request did not get so far. outcome: ok, aborted, or the
    code of an error.
    """

    model: str
    outcome: str
    tier: Tier
    cold: bool
    phases: Phases
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ttft_s: float | None
    tpot_s: float | None
    gateway_in_s: float | None
    gateway_out_s: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class ModelGauges:
    """The present of one model, read when somebody asks for the metrics."""

    model: str
    in_flight: int
    waiting: int
    replicas: int
    dram_bytes: int
    kv: KVUsage | None


def observe_request(request: ServedRequest) -> None:
    """Count a request that was admitted, at its end."""
    model = request.model
    _requests.labels(model, request.outcome).inc()
    _tokens.labels(model, "prompt").inc(request.prompt_tokens)
    _tokens.labels(model, "cached").inc(request.cached_tokens)
    _tokens.labels(model, "completion").inc(request.completion_tokens)
    if request.tpot_s is not None:
        _tpot.labels(model).observe(request.tpot_s)
    for direction, seconds in (("in", request.gateway_in_s), ("out", request.gateway_out_s)):
        if seconds is not None:
            _gateway.labels(direction).observe(seconds)
    if request.ttft_s is not None:
        _ttft.labels(model, "cold" if request.cold else "warm").observe(request.ttft_s)
        _queue.labels(model).observe(request.phases.queue_s)
        if request.cold:
            _observe_cold_start(request)


def _observe_cold_start(request: ServedRequest) -> None:
    _cold_requests.labels(request.model, request.tier.label).inc()
    for phase in _COLD_PHASES:
        seconds: float = getattr(request.phases, f"{phase}_s")
        _cold_phase.labels(request.model, phase).observe(seconds)


def observe_refusal(model: str, outcome: str) -> None:
    """Count a request that was never admitted. model is empty when no such model is deployed."""
    _requests.labels(model, outcome).inc()


def observe_response(status: int) -> None:
    _responses.labels(str(status)).inc()


def observe_forecast_tick(seconds: float) -> None:
    _forecast_tick.observe(seconds)


def count_forecast_failure(part: str) -> None:
    """part: restore, tick, save or prefetch."""
    _forecast_failures.labels(part).inc()


def count_training(outcome: str) -> None:
    """outcome: taken, no_better or failed."""
    _trainings.labels(outcome).inc()


def forget_model(model: str) -> None:
    """Drop every series of a deleted model, so that names do not pile up."""
    for metric in _BY_MODEL:
        metric.remove_by_labels({"model": model})


@dataclasses.dataclass(frozen=True, slots=True)
class TierSample:
    """The present value of one of the nodes' own metrics; labels as its family names them."""

    name: str
    node: str
    labels: tuple[str, ...]
    value: float


@dataclasses.dataclass(frozen=True, slots=True)
class UsageSample:
    """A sum since the server started; labels as its family names them."""

    name: str
    labels: tuple[str, ...]
    value: float


class _Samples(Collector):
    """Values that others count, for one rendering."""

    def __init__(self, families: Iterable[Family], samples: Iterable[UsageSample]) -> None:
        self._families = families
        self._samples: dict[str, list[UsageSample]] = {}
        for sample in samples:
            self._samples.setdefault(sample.name, []).append(sample)

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            make = CounterMetricFamily if family.is_counter else GaugeMetricFamily
            metric = make(family.name, family.text, labels=family.labels)
            for sample in self._samples.get(family.name, ()):
                metric.add_metric(sample.labels, sample.value)
            yield metric


@dataclasses.dataclass(frozen=True, slots=True)
class ForecastGauges:
    """The forecaster's present. age_s: None without forecasts, which shows as NaN. num_series: by
    the model that speaks for them, and why that one.
    """

    age_s: float | None = None
    num_series: Mapping[tuple[str, str], int] = dataclasses.field(default_factory=dict)


def _of_nodes(samples: Iterable[TierSample]) -> _Samples:
    families = [dataclasses.replace(one, labels=("node", *one.labels)) for one in _TIERS]
    return _Samples(
        families, (UsageSample(one.name, (one.node, *one.labels), one.value) for one in samples)
    )


def render_metrics(
    models: Iterable[ModelGauges],
    tiers: Iterable[TierSample] = (),
    forecasts: ForecastGauges | None = None,
    *,
    usage: Iterable[UsageSample] = (),
) -> bytes:
    """Every metric in Prometheus's text format, the gauges as the arguments say."""
    forecasts = forecasts or ForecastGauges()
    _forecast_age.set(math.nan if forecasts.age_s is None else forecasts.age_s)
    _forecast_series.clear()
    for (model, why), number in forecasts.num_series.items():
        _forecast_series.labels(model, why).set(number)
    for gauge in _GAUGES:
        gauge.clear()
    for entry in models:
        _in_flight.labels(entry.model).set(entry.in_flight)
        _waiting.labels(entry.model).set(entry.waiting)
        _replicas.labels(entry.model).set(entry.replicas)
        _dram.labels(entry.model).set(entry.dram_bytes)
        if entry.kv is not None:
            for state in ("used", "cached", "free"):
                _kv.labels(entry.model, state).set(getattr(entry.kv, state))
    others = CollectorRegistry()
    others.register(_of_nodes(tiers))
    others.register(_Samples(_USAGE, usage))
    return generate_latest(_registry) + generate_latest(others)


_CHATTY = ("boto3", "botocore", "httpx", "huggingface_hub", "urllib3")
"""Libraries that tell at info what is of use to nobody who serves."""


def configure_logging(
    level: Literal["debug", "info", "warning", "error"],
    style: Literal["auto", "console", "json"] = "auto",
) -> None:
    """Send every log line of this process to stderr, ours and the libraries' alike.

    auto: coloured text on a terminal, one JSON object a line elsewhere.
    """
    as_text = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    threshold = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=_final_processors(as_text=as_text)
        )
    )
    logging.basicConfig(handlers=[handler], level=threshold, force=True)
    for library in _CHATTY:
        logging.getLogger(library).setLevel(max(threshold, logging.WARNING))


def _final_processors(*, as_text: bool) -> list[structlog.typing.Processor]:
    """Tracebacks come without local variables, because those hold prompts and keys."""
    drop_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    if as_text:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
        return [drop_meta, renderer]
    return [
        drop_meta,
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
