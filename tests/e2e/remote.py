"""A model in an object store, and servers that reach it through a proxy that can do harm."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.harness import Server, eventually, running
from tests.integration.store import objectstore
from tests.integration.store.transit import Transit

import checkpoint

SHAPE = checkpoint.Shape(hidden=256, intermediate=1024, layers=16, heads=4, kv_heads=2)
SOURCE = "s3://models/tiny"
PROMPT = [7, 300, 42, 9, 1234]
NUM_TOKENS = 6
MIB = 1 << 20

Answer = list[tuple[str, float]]


def write_bucket(root: Path) -> Path:
    """The model, at SOURCE of the store that serves `root`; where its weights are."""
    checkpoint.write(root / "models" / "tiny", SHAPE, seed=3)
    return root / "models" / "tiny" / "model.safetensors"


@contextlib.contextmanager
def passing(root: Path, log: Path) -> Iterator[Transit]:
    """An object store behind a proxy, which this process's children find as users' do theirs."""
    with (
        pytest.MonkeyPatch.context() as patch,
        objectstore.serving(root, log, "5m") as upstream,
        Transit(upstream).running() as transit,
    ):
        objectstore.configure(patch, transit.url, log.parent)
        yield transit


SETTINGS = {
    "NODE__NUM_WORKERS": "1",
    "NODE__DRAM_BYTES": "96MiB",
    "ENGINE__KV_BYTES": "16MiB",
    "STORE__REMOTE_TIMEOUT_S": "2",
    "STORE__REMOTE_RETRIES": "2",
    "STORE__VERIFY_FETCHES": "always",
    "STORE__SCRUB_BYTES_PER_S": "0",
    "POLICY__FAILURE_BACKOFF_S": "0",
}


@contextlib.contextmanager
def serving(**settings: str) -> Iterator[Server]:
    with running(**{**SETTINGS, **settings}) as server:
        yield server


def complete(server: Server, model: str) -> httpx.Response:
    body = {
        "model": model,
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "logprobs": 0,
        "flashserve": {"reuse_prefix": False},
    }
    with server.http() as http:
        return http.post("/v1/completions", json=body)


def answer(server: Server, model: str) -> Answer:
    """Tokens and their log probabilities, which any harm to the weights changes."""
    reply = complete(server, model)
    assert reply.status_code == 200, f"{reply.text}\n{server.log()}"
    found = reply.json()["choices"][0]["logprobs"]
    assert len(found["tokens"]) == NUM_TOKENS
    return list(zip(found["tokens"], found["token_logprobs"], strict=True))


def refused(reply: httpx.Response) -> dict[str, Any]:
    """The error object of an OpenAI body, whose message is one line."""
    assert reply.status_code >= 400, reply.text
    error = reply.json()["error"]
    assert {"message", "type", "code"} <= error.keys()
    assert "\n" not in error["message"]
    assert "Traceback" not in reply.text
    return error


def ps(server: Server, model: str) -> dict[str, Any]:
    """What `flashserve ps --json` says of a model."""
    listed = json.loads(server.succeed("ps", "--json"))
    return next(each for each in listed if each["name"] == model)


def await_disk(server: Server, model: str) -> Path:
    """Returns when the model has come to disk behind its load; where its weights are there."""
    eventually(lambda: server.model(model)["disk_bytes"], f"{model} is on disk")
    (path,) = (server.data_dir / "store").glob("checkpoints/*/model.safetensors")
    return path


def fsck(server: Server) -> dict[str, Any]:
    """The report on the disk tier of a server that does not run."""
    return json.loads(server.succeed("fsck", "--no-repair", "--json"))


def move(server: Server, model: str, action: str, tier: str) -> httpx.Response:
    """Stages or evicts a model."""
    with server.admin() as admin:
        return admin.post(f"/admin/v1/models/{model}/{action}", json={"tier": tier})


def make_cold(server: Server, model: str, tier: str = "disk") -> None:
    """Takes a model out of `tier` and above."""
    move(server, model, "evict", tier).raise_for_status()
