"""Adapters over HTTP: our own routes, /v1/models, and those that vLLM's clients know."""

from __future__ import annotations

import httpx
import pytest
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.fakes import MODEL, Running

from flashserve.errors import CheckpointError

ADAPTERS = "/admin/v1/adapters"
ORDER = {"base": MODEL, "name": "a/shout", "source": "/loras/shout"}


@pytest.fixture
def http(server: Running):
    with server.client() as client:
        yield client


def test_an_adapter_is_added_listed_and_removed(http: httpx.Client, server: Running) -> None:
    reply = http.post(ADAPTERS, json={**ORDER, "replace": True})
    assert reply.status_code == 201
    assert server.service.calls == [("add_adapter", MODEL, "a/shout", "/loras/shout", False, True)]
    (adapter,) = http.get(ADAPTERS).json()["data"]
    assert adapter == reply.json()
    assert (adapter["name"], adapter["base"], adapter["tier"]) == ("a/shout", MODEL, "dram")
    assert adapter["targets"] == ["q_proj", "v_proj"]
    assert http.get(f"{ADAPTERS}?base={MODEL}").json()["data"] == [adapter]
    assert http.get(f"{ADAPTERS}?base=other").json()["data"] == []
    assert http.delete(f"{ADAPTERS}/a/shout").json() == {"name": "a/shout", "removed": True}
    assert http.get(ADAPTERS).json()["data"] == []
    assert http.delete(f"{ADAPTERS}/a/shout").status_code == 404


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"base": ""}, "base"),
        ({"base": "a:b"}, "base"),
        ({"name": "a b"}, "name"),
        ({"name": "a:b"}, "name"),
        ({"source": ""}, "source"),
        ({"source": 5}, "source"),
        ({"replace": "yes"}, "replace"),
        ({"rank": 8}, "rank"),
    ],
)
def test_a_wrong_order_names_the_field(
    http: httpx.Client, server: Running, change: dict[str, object], param: str
) -> None:
    reply = http.post(ADAPTERS, json={**ORDER, **change})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert server.service.calls == []


def test_an_adapter_that_cannot_be_served_is_refused_with_the_reason(
    http: httpx.Client, server: Running
) -> None:
    server.service.refusal = CheckpointError("adapter_config.json: use_dora is not served")
    reply = http.post(ADAPTERS, json=ORDER)
    assert reply.status_code == 422
    assert "use_dora" in reply.json()["error"]["message"]


def test_models_list_adapters_with_their_parent(http: httpx.Client) -> None:
    http.post(ADAPTERS, json=ORDER)
    model, adapter = http.get("/v1/models").json()["data"]
    assert model["id"] == MODEL
    assert adapter == {
        "id": "a/shout",
        "object": "model",
        "created": 1700000000,
        "owned_by": "flashserve",
        "root": "/loras/shout",
        "parent": MODEL,
    }
    assert http.get("/v1/models/a/shout").json() == adapter
    assert http.get(f"/v1/models/{MODEL}:a/shout").json() == adapter


def test_a_request_may_name_an_adapter_and_hears_that_name(
    http: httpx.Client, server: Running
) -> None:
    for asked in ("a/shout", f"{MODEL}:a/shout"):
        server.service.statuses[asked] = server.service.statuses[MODEL]
        body = {"model": asked, "prompt": "hi"}
        reply = http.post("/v1/completions", json=body).json()
        assert reply["model"] == asked
    assert [request.model_id for request in server.service.requests] == [
        "a/shout",
        f"{MODEL}:a/shout",
    ]


@pytest.mark.parametrize("model", ["a:b:c", ":a", "a:", ":"])
def test_a_name_that_nothing_can_have_is_not_found(http: httpx.Client, model: str) -> None:
    reply = http.post("/v1/completions", json={"model": model, "prompt": "hi"})
    assert reply.status_code == 404


def test_the_routes_of_vllm_are_off_by_default(http: httpx.Client) -> None:
    body = {"lora_name": "shout", "lora_path": "/loras/shout"}
    assert http.post("/v1/load_lora_adapter", json=body).status_code == 404
    assert http.post("/v1/unload_lora_adapter", json=body).status_code == 404


def test_the_routes_of_vllm_add_and_remove_for_administrators(start: Start) -> None:
    server = start(server={"vllm_adapter_routes": True}, api_keys=("user",), admin_keys=("admin",))
    body = {"lora_name": "shout", "lora_path": "/loras/shout", "unknown": 1}
    with server.client() as http:
        user, admin = ({"Authorization": f"Bearer {key}"} for key in ("user", "admin"))
        assert http.post("/v1/load_lora_adapter", json=body, headers=user).status_code == 403
        reply = http.post("/v1/load_lora_adapter", json=body, headers=admin)
        assert (reply.status_code, reply.text) == (
            200,
            "Success: LoRA adapter 'shout' added successfully.",
        )
        assert server.service.calls == [
            ("add_adapter", MODEL, "shout", "/loras/shout", False, False)
        ]
        name = {"lora_name": "shout"}
        assert http.post("/v1/unload_lora_adapter", json=name, headers=user).status_code == 403
        assert http.post("/v1/unload_lora_adapter", json=name, headers=admin).status_code == 200
        assert server.service.registry == {}


def test_vllms_route_needs_a_base_where_there_are_several_models(start: Start) -> None:
    server = start(server={"vllm_adapter_routes": True})
    body = {"lora_name": "shout", "lora_path": "/loras/shout"}
    with server.client() as http:
        server.service.statuses["other"] = server.service.statuses[MODEL]
        reply = http.post("/v1/load_lora_adapter", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "base_model_name"
        reply = http.post("/v1/load_lora_adapter", json={**body, "base_model_name": MODEL})
        assert reply.status_code == 200
