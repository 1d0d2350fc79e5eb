"""The parent's end of peers/nursery.py: asks for one load at a time, each in a fresh process."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TIMEOUT_S = 300.0


class LoadFailedError(Exception):
    """A loader did not do its work; one line says why."""


class Nursery:
    """One load at a time. Made by `nursery`."""

    def __init__(self, pid: int, link: socket.socket, directory: pathlib.Path) -> None:
        self.pid = pid
        self._link = link
        self._directory = directory

    def measure(
        self, job: dict[str, Any], before_go: Callable[[], None] = lambda: None
    ) -> dict[str, Any]:
        """Forks a process for the job (peers.job.Job without scratch), and lets it load.

        Args:
            job: its fields, JSON only.
            before_go: brings caches into their state, once the process waits for its word.

        Raises:
            LoadFailedError: the loader is missing, fails, hangs, or brings wrong bytes.
        """
        with tempfile.TemporaryDirectory(dir=self._directory) as scratch:
            file = pathlib.Path(scratch) / "job"
            (pathlib.Path(scratch) / "scratch").mkdir()
            file.write_text(json.dumps({**job, "scratch": f"{scratch}/scratch"}))
            self._link.send(str(file).encode())
            pid = int(self._receive().removeprefix(b"pid "))
            answer = b""
            try:
                message = self._receive()
                if message == b"ready":
                    before_go()
                    self._link.send(b"go")
                    message = self._receive()
                while not message.startswith(b"ended"):
                    answer, message = message, self._receive()
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                self._receive()
                raise LoadFailedError(f"not done after {TIMEOUT_S:.0f} s") from None
        if not answer:
            raise LoadFailedError(f"the process ended with {message.split()[1].decode()}")
        result: dict[str, Any] = json.loads(answer)
        if "error" in result:
            raise LoadFailedError(result["error"])
        return result

    def _receive(self) -> bytes:
        message = self._link.recv(1 << 20)
        if not message:
            raise SystemExit("the process that forks the loaders is gone")
        return message


@contextlib.contextmanager
def nursery(
    directory: pathlib.Path, fds: Sequence[int] = (), env: dict[str, str] | None = None
) -> Iterator[Nursery]:
    """Starts the forking process; its children's output goes to the file `log` in `directory`.

    fds: descriptors that its children need, under the same numbers.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    script = pathlib.Path(__file__).parent / "peers" / "nursery.py"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), str(theirs.fileno())],
            pass_fds=(theirs.fileno(), *fds),
            env={**os.environ, "TMPDIR": str(directory), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    theirs.close()
    ours.settimeout(TIMEOUT_S)
    try:
        if ours.recv(16) != b"nursery":
            raise SystemExit(
                (directory / "log").read_text() or "the loaders' process did not start"
            )
        yield Nursery(process.pid, ours, directory)
    finally:
        ours.close()
        process.terminate()
        process.wait(timeout=30)


@dataclasses.dataclass(frozen=True, slots=True)
class Samples:
    """What one row's repeats gave; `failure` instead when any of them failed."""

    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    failures: list[str] = dataclasses.field(default_factory=list)

    def of(self, key: str) -> list[float]:
        return [result[key] for result in self.results if key in result]
