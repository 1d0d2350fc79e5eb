"""Starts the real `flashserve serve` and looks at it from outside, as users do."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

T = TypeVar("T")

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
PATIENCE_S = 60.0
"""No test asserts a time: whoever waits longer than this has found a hang."""

_FLASHSERVE = [sys.executable, "-m", "flashserve.cli.main"]


def eventually(
    look: Callable[[], T], what: str, *, within_s: float = PATIENCE_S, poll_s: float = 0.05
) -> T:
    """Polls until `look` returns something true, and returns that."""
    deadline = time.monotonic() + within_s
    while True:
        if found := look():
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"after {within_s} s still not so: {what}")
        time.sleep(poll_s)


class Server:
    """One server process with a data directory of its own.

    settings: variables without their FLASHSERVE_ prefix, such as NODE__NUM_WORKERS="1"; an empty
    one is left at its default.
    """

    def __init__(self, data_dir: Path, **settings: str) -> None:
        self.data_dir = data_dir
        small = {
            # What a forecast starts or stops would come between the steps of a test.
            "POLICY__NAME": "keep-alive",
            "DATA_DIR": str(data_dir),
            "LOG_LEVEL": "warning",
            "SERVER__PORT": "0",
            "NODE__NUM_WORKERS": "2",
            "NODE__THREADS_PER_WORKER": "1",  # more collapse when the cores are busy
            "NODE__DRAM_BYTES": "768MiB",
            "ENGINE__KV_BYTES": "96MiB",
        }
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("FLASHSERVE_")}
        wanted = {**small, **settings}
        chosen = {f"FLASHSERVE_{name}": value for name, value in wanted.items() if value}
        self.env = {**inherited, **chosen, "PYTHONUNBUFFERED": "1"}
        self.url = ""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> Server:
        with self._log().open("a") as log:
            self._process = subprocess.Popen(
                [*_FLASHSERVE, "serve"],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.search(r"http://\S+", line):
                self.url = found[0]
                return self
        raise AssertionError(f"the server stopped before it listened:\n{self._log().read_text()}")

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def workers(self) -> list[psutil.Process]:
        """The worker processes, spare or not."""
        children = psutil.Process(self.pid).children(recursive=True)
        return [child for child in children if _runs(child, "flashserve.node.worker")]

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        """The exit code of a server that was told to stop."""
        assert self._process is not None
        code = self._process.wait(PATIENCE_S)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> None:
        """If it runs."""
        if self.is_alive():
            self.signal(signal.SIGKILL)
            self.wait()

    def log(self) -> str:
        return self._log().read_text()

    def _log(self) -> Path:
        return self.data_dir / "server.log"

    def cli(self, *args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs one command against this server, through its private socket."""
        return subprocess.run(
            [*_FLASHSERVE, *args],
            env=self.env,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=3 * PATIENCE_S,
            check=False,
        )

    def succeed(self, *args: str) -> str:
        """The standard output of a command that must succeed."""
        done = self.cli(*args)
        assert done.returncode == 0, f"{args}: {done.stderr}\n{self.log()}"
        return done.stdout

    def deploy(self, name: str, source: str | Path, **options: object) -> None:
        """As the command does, which takes a second to start."""
        with self.admin() as admin:
            body = {"name": name, "source": str(source), **options}
            reply = admin.post("/admin/v1/models", json=body)
        assert reply.is_success, f"{reply.text}\n{self.log()}"

    def models(self) -> dict[str, dict[str, Any]]:
        """Every deployed model by its name."""
        with self.admin() as admin:
            listed = admin.get("/admin/v1/models").raise_for_status().json()["data"]
        return {model["name"]: model for model in listed}

    def model(self, name: str = MODEL) -> dict[str, Any]:
        return self.models()[name]

    def admin(self) -> httpx.Client:
        """The API through the private socket: trusted, needs no key."""
        transport = httpx.HTTPTransport(uds=str(self.data_dir / "run" / "flashserve.sock"))
        return httpx.Client(transport=transport, base_url="http://localhost", timeout=PATIENCE_S)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=3 * PATIENCE_S)

    def ask(self, prompt: str = QUESTION, *, model: str = MODEL, **parameters: Any) -> str:
        """The greedy answer to one chat message, not streamed."""
        with self.http() as http:
            reply = http.post(
                "/v1/chat/completions", json=chat_body(prompt, model=model, **parameters)
            )
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    def await_idle(self, name: str = MODEL) -> dict[str, Any]:
        """Waits until nothing runs, and no KV block is in use, for a model."""

        def idle() -> dict[str, Any] | None:
            model = self.model(name)
            kv = model["kv"] or {"used": 0}
            busy = model["in_flight"] or model["waiting"] or kv["used"]
            return None if busy else model

        return eventually(idle, f"{name} is idle")


def chat_body(prompt: str = QUESTION, *, model: str = MODEL, **parameters: Any) -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": 24,
        **parameters,
    }


@contextlib.contextmanager
def scratch_dir() -> Iterator[Path]:
    """A new directory with a short path: a Unix socket's path holds 108 bytes at most."""
    path = Path(tempfile.mkdtemp(prefix="fs-", dir="/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def running(checkpoint: Path | None = None, **settings: str) -> Iterator[Server]:
    """A server, with `checkpoint` deployed as MODEL if given; stopped whatever happens."""
    with scratch_dir() as data_dir:
        server = Server(data_dir, **settings)
        try:
            server.start()
            if checkpoint is not None:
                server.deploy(MODEL, checkpoint)
            yield server
        finally:
            server.kill()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON objects of a server-sent event stream; the stream must end with [DONE]."""
    for line in lines:
        if line == "data: [DONE]":
            return
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))
    raise AssertionError("the stream ended without [DONE]")


def _runs(process: psutil.Process, module: str) -> bool:
    try:
        return module in process.cmdline()
    except psutil.NoSuchProcess:
        return False
