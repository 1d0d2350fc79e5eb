"""`make demo`: one question, answered from every tier by a real server, with its receipts.

Everything it starts it also stops, and it looks whether that worked. The converted model stays in
the given directory for the next run; whatever else the server keeps is temporary.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashserve.cli import console
from flashserve.cli.client import Client, connect_to_socket
from flashserve.cli.generate import answer_chunks, collect
from flashserve.errors import FlashServeError, InternalError, UnavailableError

QUESTION = "What is the capital of France?"
MODEL = "smollm2"
KEEP_ALIVE_S = 2.0
PHASES = ("queue", "place", "fetch", "dram", "device", "init", "prefill")

_PATIENCE_S = 120.0
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, never written
_WIDTH = 80


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flashserve.cli.demo", description=__doc__)
    parser.add_argument(
        "--data-dir", type=Path, default=Path(".demo"), help="keeps the converted model"
    )
    options = parser.parse_args(arguments)
    try:
        show(options.data_dir.absolute() / "models" / MODEL)
    except (FlashServeError, OSError) as error:
        sys.stderr.write(f"demo: error: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def show(checkpoint: Path) -> None:
    """Runs the demo.

    Raises:
        FlashServeError: a step failed, or something was left behind.
    """
    shared_memory = _names(_SHARED_MEMORY)
    _say("The model: SmolLM2-135M-Instruct, converted once and kept")
    if subprocess.run(  # noqa: S603
        [sys.executable, "-m", "flashserve.store.sources.demo", str(checkpoint)], check=False
    ).returncode:
        raise UnavailableError("the demo model could not be converted")
    with _server(checkpoint.parent) as (process_ids, client):
        _ask_from_every_tier(client)
    _await(lambda: not any(map(_is_running, process_ids)), "the server's processes are gone")
    if left := _names(_SHARED_MEMORY) - shared_memory:
        raise InternalError(f"left in {_SHARED_MEMORY}: {', '.join(sorted(left))}")
    _say(f"The server and its {len(process_ids) - 1} workers are gone, /dev/shm is as it was.")


@contextlib.contextmanager
def _server(models: Path) -> Iterator[tuple[list[int], Client]]:
    """A server with an empty catalogue, and the ids of its processes; drained at the end."""
    _say("The server: two workers, 1 GiB of memory for checkpoints")
    with tempfile.TemporaryDirectory(prefix="flashserve-demo-") as data_dir:
        (Path(data_dir) / "models").symlink_to(models, target_is_directory=True)
        # Settings of the person who runs the demo do not belong to it.
        env = {name: v for name, v in os.environ.items() if not name.startswith("FLASHSERVE_")}
        command = ["serve", "--port", "0", "--workers", "2", "--dram", "1GiB"]
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "flashserve.cli.main", *command],
            env={**env, "FLASHSERVE_DATA_DIR": data_dir, "FLASHSERVE_LOG_LEVEL": "warning"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            _print_first_line(process)
            with connect_to_socket(Path(data_dir, "run", "flashserve.sock")) as client:
                _await(lambda: len(_children(process.pid)) >= 2, "the workers are started")
                yield [process.pid, *_children(process.pid)], client
            process.send_signal(signal.SIGTERM)
            if code := process.wait(_PATIENCE_S):
                raise InternalError(f"the server ended with exit code {code}")
        finally:
            process.kill()
            process.wait()


def _ask_from_every_tier(client: Client) -> None:
    _say(f"Deployed from demo:smollm2, to stop after {KEEP_ALIVE_S:.0f} s without a request")
    client.deploy(MODEL, "demo:smollm2", {"keep_alive_s": KEEP_ALIVE_S})
    console.print_line(f"\nQuestion: {QUESTION}")
    receipts = {}
    client.evict(MODEL, "dram")
    receipts["disk"] = _ask(client, "1. Cold, from disk (the kernel may have the file cached)")
    client.evict(MODEL, "dram")
    client.stage(MODEL, "dram")
    receipts["dram"] = _ask(client, "2. Cold, its bytes staged in DRAM")
    receipts["warm"] = _ask(client, "3. Warm")
    _await(lambda: client.models()[0]["state"] == "cold", "the keep-alive is over")
    receipts["after zero"] = _ask(client, "4. Scaled to zero by its keep-alive, woken again")
    console.print_line("\nWhere the time to the first token went: predicted / actual, in ms\n")
    _print_receipts(receipts)


def _ask(client: Client, how: str) -> dict[str, Any]:
    """Prints one answer and what it took; returns its receipt."""
    parameters = {"model": MODEL, "max_tokens": 40, "temperature": 0.0}
    answer = collect(answer_chunks(client, QUESTION, parameters))
    receipt: dict[str, Any] = answer["receipt"]
    console.print_line(f"\n{how}")
    console.print_line(
        textwrap.fill(answer["text"], _WIDTH, initial_indent="  ", subsequent_indent="  ")
    )
    console.print_line(
        f"  first token after {console.human_seconds(receipt['ttft_s'])}, "
        f"{answer['usage']['completion_tokens']} tokens "
        f"in {console.human_seconds(receipt['total_s'])}; the bytes were in: {receipt['tier']}"
    )
    return receipt


def _print_receipts(receipts: dict[str, dict[str, Any]]) -> None:
    rows = [
        [phase, *(_both(receipt, f"{phase}_s") for receipt in receipts.values())]
        for phase in PHASES
    ]
    totals = (
        f"{sum(receipt['predicted'].values()) * 1000:.0f} / {receipt['ttft_s'] * 1000:.0f}"
        for receipt in receipts.values()
    )
    rows.append(["first token", *totals])
    console.print_table(["phase", *receipts], rows, right=list(receipts))
    console.print_line("")


def _both(receipt: dict[str, Any], phase: str) -> str:
    return f"{receipt['predicted'][phase] * 1000:.0f} / {receipt['actual'][phase] * 1000:.0f}"


def _print_first_line(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not re.search(r"http://\S+", line):
        raise UnavailableError("the server did not start")
    console.print_line(f"  {textwrap.shorten(line, _WIDTH - 2, placeholder=' ...')}")


def _await(look: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    while not look():
        if time.monotonic() > deadline:
            raise InternalError(f"after {_PATIENCE_S:.0f} s still not so: {what}")
        time.sleep(0.05)


def _children(parent: int) -> list[int]:
    entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    return [int(entry.name) for entry in entries if _parent(entry) == parent]


def _parent(entry: Path) -> int | None:
    try:
        # The second field, the command in parentheses, may hold anything.
        return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def _is_running(process_id: int) -> bool:
    return Path(f"/proc/{process_id}").exists()


def _names(directory: Path) -> set[str]:
    return {entry.name for entry in directory.iterdir()} if directory.is_dir() else set()


def _say(text: str) -> None:
    console.print_line(f"* {text}")


if __name__ == "__main__":
    sys.exit(main())
