"""The LSTM of the published hybrid: it continues what Prophet's forecast left of each series.

Residuals of a window of bins go in, divided by their spread; those of the bins to come go out.
Trained with squared loss by `residual_train`, in a process of its own, where alone a tensor library
is imported; computed in numpy.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np

from flashserve.forecast.core import Floats
from flashserve.forecast.hazard import Singles
from flashserve.forecast.network.process import run_apart

WINDOW_BINS = 24
HORIZON_BINS = 12


@dataclasses.dataclass(frozen=True, slots=True)
class ResidualWeights:
    """input_weights [1, 4H], hidden_weights [H, 4H], bias [4H]; out_weights [H, bins], out_bias."""

    input_weights: Singles
    hidden_weights: Singles
    bias: Singles
    out_weights: Singles
    out_bias: Singles

    def ahead(self, windows: Singles) -> Singles:
        """What follows [series, WINDOW_BINS]: [series, HORIZON_BINS], in the same unit."""
        num = len(self.hidden_weights)
        hidden = np.zeros((len(windows), num), dtype=np.float32)
        cell = np.zeros_like(hidden)
        for column in windows.T:
            gates = column[:, None] * self.input_weights + hidden @ self.hidden_weights + self.bias
            sigmoid = 0.5 + 0.5 * np.tanh(0.5 * gates)
            inner = np.tanh(gates[:, 2 * num : 3 * num])
            cell = sigmoid[:, num : 2 * num] * cell + sigmoid[:, :num] * inner
            hidden = sigmoid[:, 3 * num :] * np.tanh(cell)
        result: Singles = hidden @ self.out_weights + self.out_bias
        return result


def windows_of(residuals: Floats) -> tuple[Singles, Singles]:
    """Every window of [bins], and what followed it."""
    total = WINDOW_BINS + HORIZON_BINS
    if len(residuals) < total:
        return np.empty((0, WINDOW_BINS), np.float32), np.empty((0, HORIZON_BINS), np.float32)
    views = np.lib.stride_tricks.sliding_window_view(residuals, total).astype(np.float32)
    return views[:, :WINDOW_BINS], views[:, WINDOW_BINS:]


def train_apart(inputs: Singles, outputs: Singles, seed: int, num_epochs: int) -> ResidualWeights:
    """Train in a process of its own; raises UnavailableError when that fails."""
    with tempfile.TemporaryDirectory(prefix="flashserve-residual-") as name:
        folder = Path(name)
        np.savez(folder / "windows.npz", inputs=inputs, outputs=outputs)
        (folder / "settings.json").write_text(json.dumps({"seed": seed, "num_epochs": num_epochs}))
        run_apart("flashserve.forecast.residual_train", folder, 300)
        with np.load(folder / "weights.npz", allow_pickle=False) as file:
            return ResidualWeights(**{field: file[field] for field in file.files})
