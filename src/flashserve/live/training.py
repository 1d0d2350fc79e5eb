"""Fine-tunes the forecaster's network in a process of its own, beside a server that serves.

The process gives way to all others, has one thread, a limit of CPU time, of memory and of time, and
dies with the server. Whatever becomes of it, what the server forecasts with changes only when the
new weights were better on minutes that they had not seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashserve.errors import InputError, UnavailableError
from flashserve.forecast.core import History
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.process import TrainSettings
from flashserve.forecast.network.tune import order_of
from flashserve.forecast.network.weights import NetworkWeights

COMMAND = (sys.executable, "-P", "-m", "flashserve.forecast.network.tune")
_MAX_LINE = 300
_PREFIX = "flashserve-tune-"


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """Of one training. cpu_s: of one core, dataset and scores included; wall_s: in all."""

    cpu_s: int = 600
    wall_s: float = 3600.0
    memory_bytes: int = 2 << 30

    def train_settings(self, seed: int) -> TrainSettings:
        """Two thirds of the time for the epochs; what comes before and after has the rest."""
        epochs_s = self.cpu_s * 2 // 3
        return TrainSettings(seed=seed, cpu_s=epochs_s, memory_bytes=self.memory_bytes)


@dataclasses.dataclass(frozen=True, slots=True)
class Trained:
    """Losses: mean -log of the chance given to what happened, on the held-out minutes."""

    weights: NetworkWeights
    old_loss: float
    new_loss: float

    @property
    def is_better(self) -> bool:
        return self.new_loss < self.old_loss  # False for NaN


async def tune_apart(
    history: History,
    num_held: int,
    begin: NetworkWeights | None,
    limits: Limits,
    seed: int,
    command: Sequence[str] = COMMAND,
) -> Trained:
    """Train on a history without its last `num_held` minutes, and score on these.

    Cancelling kills the process.

    Raises:
        UnavailableError: the process failed, died or took too long; one line that says why.
        InputError: it returned what are no weights.
    """
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=_PREFIX))
    try:
        await asyncio.to_thread(_write, folder, history, num_held, begin, limits, seed)
        await _run(folder, limits, command)
        return await asyncio.to_thread(_read, folder)
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _write(
    folder: Path,
    history: History,
    num_held: int,
    begin: NetworkWeights | None,
    limits: Limits,
    seed: int,
) -> None:
    order = order_of(limits.train_settings(seed), num_held, limits.cpu_s, os.getpid())
    (folder / "order.json").write_text(order)
    np.savez(folder / "history.npz", counts=history.counts, start=history.start)
    if begin is not None:
        files.save(begin, folder / "begin.npz")


async def _run(folder: Path, limits: Limits, command: Sequence[str]) -> None:
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    process = await asyncio.create_subprocess_exec(
        *command,
        str(folder),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **one_core},
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(limits.wall_s):
            _, said = await process.communicate()
    except TimeoutError:
        raise UnavailableError(f"it took over {limits.wall_s:.0f} s") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        raise UnavailableError(_reason(process.returncode, said))


def _reason(status: int, said: bytes) -> str:
    lines = said.decode(errors="replace").strip().splitlines()
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"its process ended with {how}" + (f": {lines[-1][:_MAX_LINE]}" if lines else "")


def _read(folder: Path) -> Trained:
    try:
        losses = json.loads((folder / "losses.json").read_text())
        old, new = float(losses["old"]), float(losses["new"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"the training wrote no losses ({error!r})") from None
    return Trained(files.load(folder / "weights.npz"), old, new if math.isfinite(new) else math.nan)
