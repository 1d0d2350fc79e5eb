"""Trains the global LSTM: `python -m flashserve.forecast.network.train FOLDER`, see `process`.

Truncated backpropagation through each series from its first minute on, with the state carried, as
serving carries it. The hazard heads maximise the likelihood of the interval in which the next
arrival falls; the count heads that of a negative binomial beyond the first arrival.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flashserve.forecast.core import Floats, known_counts
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.dataset import Dataset, make_dataset
from flashserve.forecast.network.features import NUM_FEATURES
from flashserve.forecast.network.process import TrainSettings
from flashserve.forecast.network.weights import (
    EXTRA_REACH,
    NUM_LEADS,
    SHAPE_REACH,
    NetworkWeights,
)

_CHUNK_MINUTES = 60
_BATCH_SERIES = 48
_COUNT_SHARE = 0.05
# The likelihood of one cell counts no more than this, so that poison teaches nothing.
_MAX_CELL_LOSS = 12.0
_HELD_OUT = 0.15


class Network(nn.Module):
    """The network of `NetworkWeights`, for gradients; inputs are normalised."""

    def __init__(self, num_hidden: int, num_head: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(NUM_FEATURES, num_hidden, batch_first=True)
        self.head = nn.Linear(num_hidden + NUM_FEATURES, num_head)
        self.out = nn.Linear(num_head, 3 * NUM_LEADS)
        self.due_scale = nn.Parameter(torch.ones(NUM_LEADS))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(
        self, x: torch.Tensor, due: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """X [series, minutes, features], due [series, minutes, leads] -> the three heads."""
        hidden, state = self.lstm(x, state)
        inner = torch.tanh(self.head(torch.cat([hidden, x], dim=-1)))
        out = self.out(inner).unflatten(-1, (3, NUM_LEADS))
        extra = EXTRA_REACH * torch.tanh(out[..., 1, :] / EXTRA_REACH)
        shape = SHAPE_REACH * torch.tanh(out[..., 2, :] / SHAPE_REACH)
        return out[..., 0, :] + self.due_scale * due, extra, shape, state

    def exported(self, data: Dataset) -> NetworkWeights:
        def array(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
            return np.ascontiguousarray(tensor.detach().numpy().astype(np.float32))

        return NetworkWeights(
            mean=data.mean,
            scale=data.scale,
            low=data.low,
            high=data.high,
            input_weights=array(self.lstm.weight_ih_l0.T),
            hidden_weights=array(self.lstm.weight_hh_l0.T),
            gate_bias=array(self.lstm.bias_ih_l0 + self.lstm.bias_hh_l0),
            head_weights=array(self.head.weight.T),
            head_bias=array(self.head.bias),
            out_weights=array(self.out.weight.T),
            out_bias=array(self.out.bias),
            due_scale=array(self.due_scale),
            exposures=data.pool.exposures,
            events=data.pool.events,
        )

    def imported(self, weights: NetworkWeights) -> None:
        """Continue from weights that were exported."""
        with torch.no_grad():
            self.lstm.weight_ih_l0.copy_(torch.from_numpy(weights.input_weights.T))
            self.lstm.weight_hh_l0.copy_(torch.from_numpy(weights.hidden_weights.T))
            self.lstm.bias_ih_l0.copy_(torch.from_numpy(weights.gate_bias))
            self.lstm.bias_hh_l0.zero_()
            self.head.weight.copy_(torch.from_numpy(weights.head_weights.T))
            self.head.bias.copy_(torch.from_numpy(weights.head_bias))
            self.out.weight.copy_(torch.from_numpy(weights.out_weights.T))
            self.out.bias.copy_(torch.from_numpy(weights.out_bias))
            self.due_scale.copy_(torch.from_numpy(weights.due_scale))


def train(
    counts: Floats,
    start: int,
    weights: Floats,
    settings: TrainSettings,
    begin: NetworkWeights | None = None,
) -> NetworkWeights:
    """The weights of the epoch that does best on series that training never sees."""
    torch.manual_seed(settings.seed)
    draw = np.random.default_rng(settings.seed)
    data = make_dataset(counts, start, weights, settings.max_cells, draw, begin)
    model = Network(settings.num_hidden, settings.num_head)
    if begin is not None:
        model = Network(begin.num_hidden, len(begin.head_bias))
        model.imported(begin)
    order = draw.permutation(data.num_series)
    num_held = int(data.num_series * _HELD_OUT)
    held, taught = order[:num_held], order[num_held:]
    num_steps = settings.num_epochs * -(-len(taught) // _BATCH_SERIES)
    optimizer = torch.optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=max(num_steps, 2), pct_start=0.2
    )
    best, best_loss = model.exported(data), _held_out_loss(model, data, held)
    began = time.process_time()
    for _ in range(settings.num_epochs):
        if time.process_time() - began > settings.cpu_s:
            break
        for batch in np.array_split(draw.permutation(taught), -(-len(taught) // _BATCH_SERIES)):
            _teach(model, data, batch, optimizer)
            schedule.step()
        loss = _held_out_loss(model, data, held)
        if loss < best_loss or not num_held:
            best, best_loss = model.exported(data), loss
    return best


def _teach(
    model: Network, data: Dataset, batch: np.ndarray, optimizer: torch.optim.Optimizer
) -> None:
    state = None
    for first in range(0, data.num_minutes, _CHUNK_MINUTES):
        loss, state = _loss(model, data, batch, first, state)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        state = (state[0].detach(), state[1].detach())


def _held_out_loss(model: Network, data: Dataset, held: np.ndarray) -> float:
    total, state = 0.0, None
    with torch.no_grad():
        for first in range(0, data.num_minutes if len(held) else 0, _CHUNK_MINUTES):
            loss, state = _loss(model, data, held, first, state)
            total += float(loss)
    return total


def _loss(
    model: Network,
    data: Dataset,
    batch: np.ndarray,
    first: int,
    state: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """Mean over cells, and the state after them."""
    cells = data.cells(batch, first, first + _CHUNK_MINUTES)
    hazard, extra, shape, state = model(
        torch.from_numpy(cells.x), torch.from_numpy(cells.due), state
    )
    share = torch.from_numpy(cells.weights)[:, None, None]
    at_risk, arrived = torch.from_numpy(cells.at_risk), torch.from_numpy(cells.arrived)
    misses = nn.functional.binary_cross_entropy_with_logits(hazard, arrived, reduction="none")
    more = torch.from_numpy(cells.more)
    has_more = ~torch.isnan(more)
    counted = _count_loss(
        torch.nan_to_num(more).double(),
        (torch.from_numpy(cells.offset) + extra).double(),
        (torch.from_numpy(cells.shape) + shape).double(),
    )
    bounded = torch.nan_to_num(counted, nan=0.0).clamp(max=_MAX_CELL_LOSS) * has_more
    total = (misses.clamp(max=_MAX_CELL_LOSS) * at_risk * share).sum()
    total = total + _COUNT_SHARE * (bounded * share).sum()
    return total / at_risk.shape[0] / at_risk.shape[1], state


def _count_loss(
    more: torch.Tensor, log_mean: torch.Tensor, log_shape: torch.Tensor
) -> torch.Tensor:
    """Negative log likelihood of the arrivals beyond the first, in double precision."""
    shape = log_shape.exp()
    log_total = torch.logaddexp(log_mean, log_shape)
    return -(
        torch.lgamma(more + shape)
        - torch.lgamma(shape)
        - torch.lgamma(more + 1)
        + shape * (log_shape - log_total)
        + more * (log_mean - log_total)
    )


def main(folder: Path) -> None:
    settings = TrainSettings(**json.loads((folder / "settings.json").read_text()))
    limit = settings.memory_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    os.nice(10)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with np.load(folder / "history.npz", allow_pickle=False) as file:
        counts, start, weights = file["counts"], int(file["start"]), file["weights"]
    begin = folder / "begin.npz"
    trained = train(
        known_counts(counts),
        start,
        weights,
        settings,
        files.load(begin) if begin.exists() else None,
    )
    files.save(trained, folder / "weights.npz")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
