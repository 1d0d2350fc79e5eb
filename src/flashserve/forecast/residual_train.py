"""Trains the residual LSTM: `python -m flashserve.forecast.residual_train FOLDER`."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flashserve.forecast.hazard import Singles
from flashserve.forecast.residual import HORIZON_BINS, ResidualWeights

_NUM_HIDDEN = 24
_BATCH = 256
_MAX_WINDOWS = 60_000
_MEMORY_BYTES = 4 << 30


def train(inputs: Singles, outputs: Singles, seed: int, num_epochs: int) -> ResidualWeights:
    """Least squares over windows [windows, WINDOW_BINS] and what follows [.., HORIZON_BINS]."""
    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(inputs))[:_MAX_WINDOWS]
    x, y = torch.from_numpy(inputs[chosen])[..., None], torch.from_numpy(outputs[chosen])
    lstm = nn.LSTM(1, _NUM_HIDDEN, batch_first=True)
    out = nn.Linear(_NUM_HIDDEN, HORIZON_BINS)
    # Who has nothing to learn from adds nothing.
    nn.init.zeros_(out.weight)
    nn.init.zeros_(out.bias)
    optimizer = torch.optim.Adam([*lstm.parameters(), *out.parameters()], 3e-3)
    for _ in range(num_epochs if len(x) else 0):
        for batch in torch.from_numpy(draw.permutation(len(x))).split(_BATCH):
            loss = nn.functional.mse_loss(out(lstm(x[batch])[0][:, -1]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    arrays = (
        lstm.weight_ih_l0.T,
        lstm.weight_hh_l0.T,
        lstm.bias_ih_l0 + lstm.bias_hh_l0,
        out.weight.T,
        out.bias,
    )
    return ResidualWeights(*(np.ascontiguousarray(array.detach().numpy()) for array in arrays))


def main(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    os.nice(10)
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text())
    with np.load(folder / "windows.npz", allow_pickle=False) as file:
        trained = train(file["inputs"], file["outputs"], **settings)
    np.savez(
        folder / "weights.npz",
        **{field.name: getattr(trained, field.name) for field in dataclasses.fields(trained)},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
