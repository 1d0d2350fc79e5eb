"""What a person sees: the same commands with a terminal of 80 columns."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.harness import MODEL, QUESTION, Server

ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(server: Server, *args: str) -> str:
    """What a command that succeeds writes to its terminal, escape sequences included."""
    ours, theirs = pty.openpty()
    env = {**server.env, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
    command = [sys.executable, "-m", "flashserve.cli.main", *args]
    with subprocess.Popen(command, env=env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = b""
        with contextlib.suppress(OSError):  # the kernel's way to say that the other end is closed
            while piece := os.read(ours, 65536):
                written += piece
    os.close(ours)
    assert process.returncode == 0, written
    return written.decode()


def test_ps_fits_80_columns(server: Server, checkpoint: Path) -> None:
    name = "team/a-model-with-quite-a-long-name-for-a-narrow-terminal"
    server.succeed("deploy", name, str(checkpoint))
    shown = ESCAPES.sub("", on_terminal(server, "ps"))
    lines = [line.rstrip() for line in shown.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "team/" in shown
    for word in ("name", "state", "tier", "replicas", "flight", "dram", "used", "reason"):
        assert word in shown
    server.succeed("delete", name)


def test_the_tiers_fit_80_columns(server: Server) -> None:
    lines = [
        line.rstrip() for line in ESCAPES.sub("", on_terminal(server, "ps", "--tiers")).split("\n")
    ]
    dram = next(line for line in lines if line.startswith("dram"))
    assert max(map(len, lines[: lines.index(dram) + 2])) <= 80
    assert any(line.startswith("arena: ") for line in lines)


def test_stage_shows_that_it_works_and_cleans_up_after_itself(
    server: Server, checkpoint: Path
) -> None:
    server.succeed("deploy", "staged", str(checkpoint))
    written = on_terminal(server, "stage", "staged", "--tier", "dram")
    assert "staging staged to dram" in written
    assert ESCAPES.sub("", written).splitlines()[-1].endswith("in DRAM")
    server.succeed("delete", "staged")


def test_deploy_shows_that_it_works_and_cleans_up_after_itself(
    server: Server, checkpoint: Path
) -> None:
    written = on_terminal(server, "deploy", "seen", str(checkpoint))
    assert "deploying seen" in written
    assert "\x1b[" in written
    assert ESCAPES.sub("", written).splitlines()[-1].startswith("seen is cold")
    server.succeed("delete", "seen")


def test_run_shows_a_sign_until_the_text_comes(server: Server) -> None:
    written = on_terminal(server, "run", MODEL, QUESTION, "--max-tokens", "8")
    assert f"waiting for {MODEL}" in written
    assert "Paris" in ESCAPES.sub("", written).splitlines()[-1]
