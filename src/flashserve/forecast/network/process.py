"""Trains the network in a process of its own, of bounded CPU, memory and time.

The process that asks never imports a tensor library and only waits; histories and weights go
through files in a directory that is removed afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from flashserve.errors import UnavailableError
from flashserve.forecast.core import Floats, History
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.weights import NetworkWeights


@dataclasses.dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train; every run with the same settings and history gives the same weights.

    max_cells: series x minutes at most; beyond it series are drawn. cpu_s: after so much CPU time
    training ends with the best weights so far. memory_bytes: of data (private pages) at most.
    """

    seed: int = 0
    num_epochs: int = 12
    num_hidden: int = 32
    num_head: int = 48
    learning_rate: float = 3e-3
    max_cells: int = 1_000_000
    cpu_s: int = 600
    memory_bytes: int = 4 << 30


def train_apart(
    history: History,
    weights: Floats | None,
    settings: TrainSettings,
    begin: NetworkWeights | None = None,
) -> NetworkWeights:
    """Train on a history and wait for it; from `begin` on, if given.

    Raises:
        UnavailableError: the training process failed or took twice its CPU time.
    """
    with tempfile.TemporaryDirectory(prefix="flashserve-train-") as name:
        folder = Path(name)
        share = np.ones(len(history.names)) if weights is None else np.asarray(weights, np.float64)
        np.savez(folder / "history.npz", counts=history.counts, start=history.start, weights=share)
        (folder / "settings.json").write_text(json.dumps(dataclasses.asdict(settings)))
        if begin is not None:
            files.save(begin, folder / "begin.npz")
        run_apart("flashserve.forecast.network.train", folder, settings.cpu_s)
        return files.load(folder / "weights.npz")


def run_apart(module: str, folder: Path, cpu_s: int) -> None:
    """Run a training module of ours on a folder, with one core, and wait for it.

    Raises:
        UnavailableError: it failed or took twice its CPU time.
    """
    command = [sys.executable, "-P", "-m", module, str(folder)]
    one_core = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    try:
        done = subprocess.run(  # noqa: S603 - our own module and a directory of our own
            command,
            env={**os.environ, **one_core},
            capture_output=True,
            text=True,
            timeout=2 * cpu_s + 60,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"training the forecaster took over {error.timeout:.0f} s: give it fewer series"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UnavailableError(f"training the forecaster failed: {reason}")
