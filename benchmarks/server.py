"""A real `flashserve serve` for the benchmarks that measure over HTTP."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping

import httpx
import msgspec

START_TIMEOUT_S = 180.0


@dataclasses.dataclass(frozen=True, slots=True)
class Server:
    """`admin` speaks over the private Unix socket, `http` over TCP as users do."""

    admin: httpx.Client
    http: httpx.Client
    data_dir: str
    pid: int


@contextlib.contextmanager
def running_server(environ: Mapping[str, str] | None = None, **settings: str) -> Iterator[Server]:
    """A server with an empty data directory, stopped at the end.

    environ: more environment variables; settings: those without their FLASHSERVE_ prefix, such as
    NODE__NUM_WORKERS="2".
    """
    with tempfile.TemporaryDirectory(prefix="fs-bench-") as data_dir:
        env = {**os.environ, **(environ or {})}
        env |= {"FLASHSERVE_DATA_DIR": data_dir, "FLASHSERVE_LOG_LEVEL": "warning"}
        env |= {f"FLASHSERVE_{name}": value for name, value in settings.items()}
        process = subprocess.Popen(
            [sys.executable, "-m", "flashserve.cli.main", "serve", "--port", "0"],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            base_url = _wait_until_listening(process)
            transport = httpx.HTTPTransport(uds=f"{data_dir}/run/flashserve.sock")
            with (
                httpx.Client(
                    transport=transport, base_url="http://flashserve", timeout=300
                ) as admin,
                httpx.Client(base_url=base_url, timeout=300) as http,
            ):
                yield Server(admin, http, data_dir, process.pid)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=60)


def _wait_until_listening(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.search(r"http://\S+", line):
            return match[0]
    raise SystemExit("the server stopped before it listened")


def deploy(server: Server, name: str, source: pathlib.Path | str, keep_alive_s: float) -> None:
    body = {"name": name, "source": str(source), "keep_alive_s": keep_alive_s}
    response = server.admin.post("/admin/v1/models", json=body)
    if response.is_error:
        raise SystemExit(f"{name} was not deployed: {response.text}")


def wait_for_state(
    server: Server, name: str, state: str, tier: str, interval_s: float = 0.05
) -> None:
    """Polls until `ps` shows the model in this state, with its bytes in this tier."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        models = server.admin.get("/admin/v1/models").json()["data"]
        status = next(model for model in models if model["name"] == name)
        if status["state"] == state and status["tier"] == tier:
            return
        time.sleep(interval_s)
    raise SystemExit(f"{name} did not become {state} in {tier}: {status}")


def completion_body(model: str, prompt_ids: list[int], max_tokens: int) -> dict:
    """A streamed greedy completion of exactly `max_tokens` that reuses no prefix."""
    return {
        "model": model,
        "prompt": prompt_ids,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "flashserve": {"reuse_prefix": False},
    }


def stream_completion(
    server: Server, model: str, prompt_ids: list[int], max_tokens: int
) -> tuple[float, dict]:
    """One streamed completion without prefix reuse.

    Returns:
        Seconds from the request's sending to its first token, and its receipt.
    """
    body = completion_body(model, prompt_ids, max_tokens)
    sent_at = time.monotonic()
    ttft_s = None
    receipt: dict = {}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            if ttft_s is None:
                ttft_s = time.monotonic() - sent_at
            chunk = msgspec.json.decode(line[6:])
            receipt = chunk.get("flashserve") or receipt
    assert ttft_s is not None, "no token came"
    return ttft_s, receipt
