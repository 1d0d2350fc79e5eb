"""Administration, health and metrics over HTTP."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.gateway.fakes import FORECAST, MODEL, Running

from flashserve.errors import QueueFullError
from flashserve.policy.schedules import Bounds
from flashserve.types import Tier


@pytest.fixture
def http(server: Running):
    with server.client() as client:
        yield client


def test_models_are_listed_as_ps_shows_them(http: httpx.Client) -> None:
    (model,) = http.get("/admin/v1/models").json()["data"]
    assert model["name"] == MODEL
    assert model["tier"] == "dram"
    shown = "state replicas in_flight dram_bytes last_used_s reason size_bytes keep_alive_s kv"
    assert set(shown.split()) <= set(model)
    assert http.get(f"/admin/v1/models/{MODEL}").json() == model


def test_a_deploy_is_created(http: httpx.Client, server: Running) -> None:
    schedule = ["daily 8:00-9:00 min=2"]
    bounds = {"min_replicas": 1, "max_replicas": 3, "target": 8, "schedule": schedule}
    order = {"name": "a/b", "source": "demo:smollm2", "keep_alive_s": 5, "replace": True, **bounds}
    reply = http.post("/admin/v1/models", json=order)
    assert reply.status_code == 201
    assert reply.json()["name"] == "a/b"
    assert server.service.calls == [
        (
            "deploy",
            "a/b",
            "demo:smollm2",
            5.0,
            Bounds(1, 3, 8, ("daily 8:00-9:00 min=2",)),
            False,
            True,
        )
    ]


@pytest.mark.parametrize(
    ("order", "status", "param"),
    [
        ({}, 400, "name"),
        ({"name": "a"}, 400, "source"),
        ({"name": "a", "source": ""}, 400, "source"),
        ({"name": "a", "source": 5}, 400, "source"),
        ({"name": "", "source": "/x"}, 400, "name"),
        ({"name": "a b", "source": "/x"}, 400, "name"),
        ({"name": "a\n", "source": "/x"}, 400, "name"),
        ({"name": "a" * 129, "source": "/x"}, 400, "name"),
        ({"name": "a", "source": "/x", "keep_alive_s": -1}, 400, "keep_alive_s"),
        ({"name": "a", "source": "/x", "keep_alive_s": "1"}, 400, "keep_alive_s"),
        ({"name": "a", "source": "/x", "keep_alife_s": 1}, 400, "keep_alife_s"),
        ({"name": "a", "source": "/x", "min_replicas": -1}, 400, "min_replicas"),
        ({"name": "a", "source": "/x", "max_replicas": 0}, 400, "max_replicas"),
        ({"name": "a", "source": "/x", "target": 1.5}, 400, "target"),
        ({"name": "a", "source": "/x", "schedule": "mon"}, 400, "schedule"),
        ({"name": "a", "source": "/missing"}, 422, None),
        ({"name": MODEL, "source": "/x"}, 409, None),
    ],
)
def test_a_wrong_deploy_says_why(
    http: httpx.Client, order: dict[str, object], status: int, param: str | None
) -> None:
    reply = http.post("/admin/v1/models", json=order)
    assert reply.status_code == status
    assert reply.json()["error"]["param"] == param


@pytest.mark.parametrize("action", ["stage", "evict"])
def test_tiers_are_ordered_by_name(http: httpx.Client, server: Running, action: str) -> None:
    reply = http.post(f"/admin/v1/models/{MODEL}/{action}", json={"tier": "dram"})
    assert reply.json()["name"] == MODEL
    assert server.service.calls == [(action, MODEL, Tier.DRAM)]
    for wrong in ({}, {"tier": "device"}, {"tier": 2}, {"tier": None}, {"tier": "dram", "x": 1}):
        reply = http.post(f"/admin/v1/models/{MODEL}/{action}", json=wrong)
        assert reply.status_code == 400
    assert http.post(f"/admin/v1/models/no/{action}", json={"tier": "disk"}).status_code == 404


@pytest.mark.parametrize("name", ["a/stage", "stage", "x/evict/stage", "v1/models"])
def test_a_models_name_may_look_like_a_route(
    http: httpx.Client, server: Running, name: str
) -> None:
    http.post("/admin/v1/models", json={"name": name, "source": "demo:smollm2"})
    assert http.get(f"/v1/models/{name}").json()["id"] == name
    for action in ("stage", "evict"):
        reply = http.post(f"/admin/v1/models/{name}/{action}", json={"tier": "disk"})
        assert reply.json()["name"] == name
    assert server.service.calls[1:] == [("stage", name, Tier.DISK), ("evict", name, Tier.DISK)]
    assert http.delete(f"/admin/v1/models/{name}").json() == {"name": name, "deleted": True}
    assert server.service.model_names() == [MODEL]


def test_decisions_are_listed_with_their_reasons(http: httpx.Client) -> None:
    decisions = http.get("/admin/v1/decisions?limit=2").json()["data"]
    assert len(decisions) == 2
    assert decisions[0] == {
        "at": 1.5,
        "action": "start_replica",
        "model_id": MODEL,
        "node_id": "local",
        "reason": "due",
    }
    assert len(http.get("/admin/v1/decisions").json()["data"]) == 3


def test_readiness_follows_the_service(http: httpx.Client, server: Running) -> None:
    assert http.get("/readyz").json() == {"status": "ready"}
    server.service.is_ready = False
    reply = http.get("/readyz")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unavailable")
    server.service.draining = True
    reply = http.get("/readyz")
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "draining")
    assert reply.headers["retry-after"] == "1"
    assert http.get("/healthz").json() == {"status": "ok"}


def test_the_page_names_the_api_and_loads_nothing(http: httpx.Client) -> None:
    reply = http.get("/")
    assert reply.headers["content-type"].startswith("text/html")
    assert "/v1/models" in reply.text
    assert "http" not in reply.text
    assert "<script" not in reply.text


def test_openapi_describes_every_route_and_body(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    schemas = document["components"]["schemas"]
    assert {"ChatRequest", "CompletionRequest", "DeployRequest", "TierRequest"} <= set(schemas)
    assert set(references(document)) <= {f"#/components/schemas/{name}" for name in schemas}
    assert list(references(document["paths"]["/v1/completions"]))


def references(value: object):
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from references(item)


REQUESTS = "flashserve_requests_total"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def await_samples(http: httpx.Client, is_enough: Callable[[Samples], bool]) -> Samples:
    """A request is counted just after its last byte has left, so perhaps after it was received."""
    for _ in range(1000):
        seen = samples(http)
        if is_enough(seen):
            return seen
    raise AssertionError("the metrics never showed it")


def samples(http: httpx.Client) -> Samples:
    reply = http.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(reply.text)
        for sample in family.samples
    }


def test_metrics_count_what_was_served(http: httpx.Client, server: Running) -> None:
    body = {"model": MODEL, "prompt": "a"}
    before = samples(http)
    for is_stream in (True, False):
        http.post("/v1/completions", json={**body, "stream": is_stream})
    http.post("/v1/completions", json={**body, "model": "nobody" * 9})
    server.service.refusal = QueueFullError("full")
    http.post("/v1/completions", json=body)
    expected = sum(before[key] for key in before if key[0] == REQUESTS) + 4
    after = await_samples(
        http, lambda seen: sum(seen[key] for key in seen if key[0] == REQUESTS) == expected
    )

    def grown(name: str, **labels: str) -> float:
        key = (f"flashserve_{name}", frozenset(labels.items()))
        return after[key] - before.get(key, 0.0)

    assert grown("requests_total", model=MODEL, outcome="ok") == 2
    assert grown("requests_total", model="", outcome="model_not_found") == 1
    assert grown("requests_total", model=MODEL, outcome="queue_full") == 1
    assert grown("ttft_seconds_count", model=MODEL, start="cold") == 2
    assert grown("queue_seconds_sum", model=MODEL) == 0.5
    assert grown("tpot_seconds_count", model=MODEL) == 2
    assert grown("cold_start_phase_seconds_sum", model=MODEL, phase="dram") == 1.0
    assert grown("cold_requests_total", model=MODEL, tier="dram") == 2
    assert grown("tokens_total", model=MODEL, kind="completion") == 6
    assert grown("tokens_total", model=MODEL, kind="cached") == 4
    assert grown("gateway_seconds_count", direction="out") == 2
    assert grown("http_responses_total", status="429") == 1
    assert after["flashserve_in_flight", frozenset({("model", MODEL)})] == 1
    assert after["flashserve_waiting", frozenset({("model", MODEL)})] == 2
    kv = frozenset({("model", MODEL), ("state", "used")})
    assert after["flashserve_kv_blocks", kv] == 3


def test_metrics_forget_a_deleted_model(http: httpx.Client) -> None:
    http.post("/admin/v1/models", json={"name": "gone", "source": "demo:smollm2"})
    http.post("/v1/completions", json={"model": "gone", "prompt": "a"})
    await_samples(http, lambda seen: any(("model", "gone") in labels for _, labels in seen))
    http.delete("/admin/v1/models/gone")
    assert not any(("model", "gone") in labels for _, labels in samples(http))


def test_tiers_are_listed_with_what_is_fetched(http: httpx.Client) -> None:
    (node,) = http.get("/admin/v1/tiers").json()["data"]
    assert node["node"] == "local"
    assert [tier["tier"] for tier in node["tiers"]] == ["dram", "disk"]
    assert node["tiers"][0] == {
        "tier": "dram",
        "total_bytes": 1000,
        "used_bytes": 600,
        "free_bytes": 400,
        "num_models": 2,
        "num_leases": 1,
        "num_evicted": 5,
        "num_damaged": 1,
    }
    assert (node["arena"]["total_bytes"], node["arena"]["prefaulted_bytes"]) == (1200, 800)
    assert node["scrub"]["ended_s"] == 12.5
    (fetch,) = node["fetches"]
    assert (fetch["model"], fetch["from"], fetch["to"]) == (MODEL, "remote", "dram")
    assert (fetch["done_bytes"], fetch["total_bytes"], fetch["eta_s"]) == (30, 90, 4.0)
    assert node["read_bytes"] == {"remote": 700, "disk": 70}


def test_metrics_have_the_tiers_of_every_node(http: httpx.Client) -> None:
    families = text_string_to_metric_families(http.get("/metrics").text)
    seen = {
        (sample.name, *(value for key, value in sorted(sample.labels.items()) if key != "node")): (
            sample.value
        )
        for family in families
        for sample in family.samples
        if sample.labels.get("node") == "local"
    }
    assert seen["flashserve_tier_bytes", "used", "dram"] == 600
    assert seen["flashserve_tier_bytes", "free", "disk"] == 3000
    assert seen["flashserve_tier_evictions_total", "dram"] == 5
    assert seen["flashserve_tier_damaged_total", "dram"] == 1
    assert seen["flashserve_tier_models", "disk"] == 3
    assert seen["flashserve_tier_leases", "dram"] == 1
    assert seen["flashserve_read_bytes_total", "remote"] == 700
    assert seen["flashserve_fetches", "dram"] == 1
    assert seen["flashserve_fetches", "disk"] == 0
    assert seen["flashserve_arena_prefaulted_bytes",] == 800
    assert seen["flashserve_scrub_rounds_total",] == 3


def test_forecasts_say_what_is_expected_and_why(http: httpx.Client) -> None:
    body = http.get("/admin/v1/forecasts").json()
    assert body["object"] == "list"
    assert body["status"] == {
        "state": "ready",
        "model": "auto",
        "made_at": FORECAST.made_at,
        "num_series": 1,
        "num_dropped": 0,
        "reason": "",
        "training": None,
    }
    assert body["data"] == [
        {
            "name": f"{MODEL}:shout",
            "made_at": FORECAST.made_at,
            "model": "hazard",
            "why": "cheapest for this series",
            "leads": [
                {
                    "lead_s": 60.0,
                    "p_arrival": 0.25,
                    "mean": 0.3,
                    "quantiles": {"0.1": 0.0, "0.5": 0.0, "0.9": 1.0, "0.99": 2.0},
                },
                {
                    "lead_s": 300.0,
                    "p_arrival": 0.5,
                    "mean": 1.5,
                    "quantiles": {"0.1": 0.0, "0.5": 1.0, "0.9": 3.0, "0.99": 5.0},
                },
            ],
            "components": {"hazard": 0.25},
        }
    ]


def test_one_forecast_is_shown_and_an_unknown_name_is_404(http: httpx.Client) -> None:
    assert http.get(f"/admin/v1/forecasts/{MODEL}:shout").json()["name"] == f"{MODEL}:shout"
    answer = http.get("/admin/v1/forecasts/nobody")
    assert answer.status_code == 404
    assert "deployed" in answer.json()["error"]["message"]


def test_metrics_have_the_age_of_the_forecasts_and_who_speaks(http: httpx.Client) -> None:
    metrics = http.get("/metrics").text
    assert "flashserve_forecast_age_seconds 12.5" in metrics
    assert (
        'flashserve_forecast_series{model="hazard",why="cheapest for this series"} 1.0' in metrics
    )


def test_savings_are_reported_by_model_adapter_and_tenant(http: httpx.Client) -> None:
    report = http.get("/admin/v1/savings", params={"days": 3}).json()
    assert (report["since"], report["policy"]) == ("2024-10-02", "flashserve")
    assert report["total"]["busy_s"] == 35.0
    assert [line["name"] for line in report["tenants"]] == ["acme", "default"]
    (other,) = report["against"]
    assert other["policy"] == "always-on"
    for days in ("0", "36", "x"):
        assert http.get("/admin/v1/savings", params={"days": days}).status_code == 400


def test_metrics_say_what_models_and_tenants_took(http: httpx.Client) -> None:
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
    }
    assert samples["flashserve_worker_seconds_total", MODEL, "busy"] == 35.0
    assert samples["flashserve_tenant_worker_seconds_total", "idle", "acme"] == 60.0
    assert samples["flashserve_tenant_worker_seconds_total", "busy", "default"] == 5.0
    assert samples["flashserve_shadow_worker_seconds", "always-on", "idle"] == 500.0
    assert samples["flashserve_shadow_cold_requests", "always-on"] == 4
