"""The policy that a server has when nobody chose one: forecasts start, requests come first."""

from __future__ import annotations

import asyncio
import concurrent.futures
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import MODEL, Server, chat_body, events, eventually, scratch_dir

from flashserve.forecast.arrivals import ArrivalCount
from flashserve.live.arrivalrows import SERVER
from flashserve.live.catalogue import Catalogue
from flashserve.types import ModelId

NUM_MINUTES = 120


@pytest.fixture(scope="module")
def forecast_server(checkpoint: Path) -> Iterator[Server]:
    """A server that was asked for the model three times in each of the last minutes."""
    with scratch_dir() as data_dir:
        first = Server(data_dir, FORECAST__ENABLED="false")
        # Waiting is dear, so that it does not matter when in a minute the test comes.
        server = Server(data_dir, POLICY__NAME="", PRICE__WAIT_PER_S="10")
        try:
            first.start()
            first.deploy(MODEL, checkpoint)
            assert first.stop() == 0, first.log()
            asyncio.run(remember_arrivals(data_dir))
            yield server.start()
            assert server.stop() == 0, server.log()
        finally:
            first.kill()
            server.kill()


async def remember_arrivals(data_dir: Path) -> None:
    now = int(time.time() // 60)
    minutes = range(now - NUM_MINUTES, now)
    catalogue = Catalogue(data_dir)
    await catalogue.open()
    try:
        ran = [ArrivalCount(SERVER, minute, 1) for minute in minutes]
        came = [ArrivalCount(ModelId(MODEL), minute, 3) for minute in minutes]
        await catalogue.add_arrivals([*ran, *came])
    finally:
        await catalogue.close()


def decisions(server: Server) -> list[dict[str, str]]:
    with server.admin() as admin:
        return admin.get("/admin/v1/decisions").raise_for_status().json()["data"]


def test_what_is_expected_is_ready_before_anybody_asks(forecast_server: Server) -> None:
    model = eventually(
        lambda: (seen := forecast_server.model())["state"] == "ready" and seen, "it is ready"
    )
    assert model["reason"].startswith("ahead of requests: P(request in")
    status = json.loads(forecast_server.succeed("forecast", "--json"))["status"]
    assert (status["state"], status["num_series"]) == ("ready", 1)
    assert MODEL in forecast_server.succeed("forecast")
    with forecast_server.http() as http:
        reply = http.post("/v1/chat/completions", json=chat_body(max_tokens=8)).json()
    assert "Paris" in reply["choices"][0]["message"]["content"]
    assert not reply["flashserve"]["cold"]


def test_requests_to_a_model_without_a_forecast_are_held_and_answered(
    forecast_server: Server, checkpoint: Path
) -> None:
    forecast_server.deploy("new", checkpoint)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(forecast_server.ask, model="new", max_tokens=8) for _ in range(4)]
        assert all("Paris" in answer.result() for answer in asked)
    found = decisions(forecast_server)
    assert {each["action"] for each in found if each["model_id"] == "new"} >= {"StartReplica"}
    assert all(each["reason"] for each in found)


def test_nothing_stops_a_replica_that_answers(forecast_server: Server, checkpoint: Path) -> None:
    forecast_server.deploy("third", checkpoint)
    body = chat_body("Tell me a story.", max_tokens=48, ignore_eos=True, stream=True)
    body["stream_options"] = {"include_usage": True}
    with (
        forecast_server.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        chunks = events(reply.iter_lines())
        next(chunks)
        # Both workers have a model by now, and a third one needs one of them.
        forecast_server.ask(model="third", max_tokens=2)
        *_, last = chunks
    assert last["usage"]["completion_tokens"] == 48
    assert last["flashserve"]["resumed"] == 0


def test_the_account_names_the_policy_and_what_was_started_ahead(forecast_server: Server) -> None:
    shown = forecast_server.succeed("savings")
    assert shown.startswith("policy flashserve, since ")
    assert MODEL in shown
    assert "keep-alive-10m" in shown
