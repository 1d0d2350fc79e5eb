from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from flashserve import telemetry
from flashserve.types import KVUsage, Phases, Tier

SERVED = telemetry.ServedRequest(
    model="unit/model",
    outcome="ok",
    tier=Tier.DISK,
    cold=True,
    phases=Phases(queue_s=1.0, dram_s=2.0, init_s=3.0),
    prompt_tokens=5,
    cached_tokens=1,
    completion_tokens=4,
    ttft_s=0.5,
    tpot_s=0.01,
    gateway_in_s=0.002,
    gateway_out_s=0.001,
)


def samples(*models: telemetry.ModelGauges) -> dict[tuple[str, ...], float]:
    text = telemetry.render_metrics(models).decode()
    return {
        (sample.name, *(v for k, v in sample.labels.items() if k != "model")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels.get("model") == SERVED.model
    }


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    telemetry.forget_model(SERVED.model)


def test_a_cold_request_is_counted_with_its_phases() -> None:
    telemetry.observe_request(SERVED)
    seen = samples()
    assert seen["flashserve_requests_total", "ok"] == 1
    assert seen["flashserve_cold_requests_total", "disk"] == 1
    assert seen["flashserve_cold_start_phase_seconds_sum", "dram"] == 2.0
    assert seen["flashserve_cold_start_phase_seconds_sum", "init"] == 3.0
    assert seen["flashserve_ttft_seconds_sum", "cold"] == 0.5
    assert seen["flashserve_tokens_total", "prompt"] == 5


def test_a_warm_request_has_no_cold_start() -> None:
    telemetry.observe_request(dataclasses.replace(SERVED, cold=False))
    seen = samples()
    assert seen["flashserve_ttft_seconds_count", "warm"] == 1
    assert not [key for key in seen if "cold" in key[0]]


def test_a_request_without_a_token_has_no_times() -> None:
    aborted = dataclasses.replace(SERVED, outcome="aborted", ttft_s=None, tpot_s=None)
    telemetry.observe_request(aborted)
    seen = samples()
    assert seen["flashserve_requests_total", "aborted"] == 1
    assert not [key for key in seen if "seconds" in key[0]]


def test_gauges_show_the_present_alone() -> None:
    gauges = telemetry.ModelGauges("unit/model", 1, 2, 3, 4, KVUsage(10, 5, 3, 2))
    seen = samples(gauges)
    assert seen["flashserve_in_flight",] == 1
    assert seen["flashserve_waiting",] == 2
    assert seen["flashserve_replicas",] == 3
    assert seen["flashserve_dram_bytes",] == 4
    assert seen["flashserve_kv_blocks", "cached"] == 3
    assert samples() == {}


def test_a_forgotten_model_leaves_no_series() -> None:
    telemetry.observe_request(SERVED)
    telemetry.observe_refusal("unit/model", "queue_full")
    telemetry.forget_model("unit/model")
    assert samples() == {}


@pytest.fixture
def _logging() -> Iterator[None]:
    """What configure_logging changes is as before after the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("_logging")
def test_log_lines_are_json_where_nobody_looks(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("info")
    with structlog.contextvars.bound_contextvars(request_id="r1"):
        structlog.get_logger().info("served", model="m\n2")
        logging.getLogger("uvicorn.error").warning("odd %s", "thing")
    ours, theirs = map(json.loads, capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["model"], ours["level"]) == ("served", "m\n2", "info")
    assert (theirs["event"], theirs["level"]) == ("odd thing", "warning")
    assert ours["request_id"] == theirs["request_id"] == "r1"
    assert ours["timestamp"].endswith("Z")


@pytest.mark.usefixtures("_logging")
def test_the_level_holds_for_our_lines_and_others(capsys: pytest.CaptureFixture[str]) -> None:
    telemetry.configure_logging("error", "json")
    structlog.get_logger().warning("ours")
    logging.getLogger("other").warning("theirs")
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_logging")
@pytest.mark.parametrize("style", ["json", "console"])
def test_tracebacks_keep_local_values_to_themselves(
    capsys: pytest.CaptureFixture[str], style: str
) -> None:
    telemetry.configure_logging("info", style)
    prompt = "a " + "secret"
    try:
        raise ValueError(len(prompt))
    except ValueError:
        structlog.get_logger().exception("failed")
    written = capsys.readouterr().err
    assert "ValueError: 8" in written
    assert "a secret" not in written
