"""The trained network as plain arrays: one LSTM for all series, and heads for each lead.

The server computes with these in numpy; only the process that trains imports a tensor library.
"""

from __future__ import annotations

import dataclasses
import zipfile
from pathlib import Path

import numpy as np

from flashserve.errors import InputError
from flashserve.forecast.core import Floats
from flashserve.forecast.hazard import Pool, Singles
from flashserve.forecast.network.features import FIRST_DUE, LEADS, NAMES, NUM_FEATURES

NUM_LEADS = len(LEADS)
# How far, in logs, heads may move the count beyond the first from its offset, and its shape.
EXTRA_REACH = 6.0
SHAPE_REACH = 4.0


@dataclasses.dataclass(frozen=True, slots=True)
class NetworkWeights:
    """Everything that inference needs. H: hidden units, M: head units, F features, K leads.

    mean, scale, low, high: [F], a feature x enters as clip((x - mean) * scale, low, high): nothing
    that training never saw goes in. input_weights [F, 4H], hidden_weights [H, 4H], gate_bias [4H]:
    gates in the order input, forget, cell, output. head_weights [H + F, M], head_bias [M].
    out_weights [M, 3K], out_bias [3K]: hazard, extra and shape of each lead. due_scale [K]: how
    much the heads trust the gap histogram. exposures, events: the hazard that series share.
    """

    mean: Singles
    scale: Singles
    low: Singles
    high: Singles
    input_weights: Singles
    hidden_weights: Singles
    gate_bias: Singles
    head_weights: Singles
    head_bias: Singles
    out_weights: Singles
    out_bias: Singles
    due_scale: Singles
    exposures: Floats
    events: Floats

    @property
    def num_hidden(self) -> int:
        return int(self.hidden_weights.shape[0])

    @property
    def pool(self) -> Pool:
        return Pool(self.exposures, self.events)

    def normalised(self, rows: Singles) -> Singles:
        """Features as the network takes them: [series, F]."""
        result: Singles = np.clip((rows - self.mean) * self.scale, self.low, self.high)
        return result

    def step(self, x: Singles, hidden: Singles, cell: Singles) -> tuple[Singles, Singles]:
        """One minute of the LSTM: hidden and cell, each [series, H]."""
        gates = x @ self.input_weights + hidden @ self.hidden_weights + self.gate_bias
        num = self.num_hidden
        sigmoid = 0.5 + 0.5 * np.tanh(0.5 * gates)
        inner = np.tanh(gates[:, 2 * num : 3 * num])
        cell = sigmoid[:, num : 2 * num] * cell + sigmoid[:, :num] * inner
        moved: Singles = sigmoid[:, 3 * num :] * np.tanh(cell)
        return moved, cell

    def heads(self, x: Singles, hidden: Singles, rows: Singles) -> tuple[Singles, Singles, Singles]:
        """Hazard logits, log extra beyond its offset, and log shape: each [series, K].

        rows: the features as they are; the gap histogram's hazard is the base of the first.
        """
        inner: Singles = np.tanh(
            np.concatenate([hidden, x], axis=1) @ self.head_weights + self.head_bias
        )
        out = (inner @ self.out_weights + self.out_bias).reshape(len(x), 3, NUM_LEADS)
        hazard: Singles = out[:, 0] + self.due_scale * due_logits(rows)
        extra: Singles = EXTRA_REACH * np.tanh(out[:, 1] / EXTRA_REACH)
        shape: Singles = SHAPE_REACH * np.tanh(out[:, 2] / SHAPE_REACH)
        return hazard, extra, shape


def due_logits(rows: Singles) -> Singles:
    """What the gap histogram gives for the interval up to each lead: log odds, [series, K].

    Given that nothing came in the interval before, so that the intervals multiply up to P(arrival).
    """
    odds = np.exp(rows[:, FIRST_DUE : FIRST_DUE + NUM_LEADS].astype(np.float64))
    quiet: Floats = np.maximum(1 / (1 + odds), 1e-5)
    before = np.concatenate([np.ones((len(rows), 1)), quiet[:, :-1]], axis=1)
    ends = np.clip(1 - quiet / before, 1e-4, 1 - 1e-4)
    logits: Singles = np.log(ends / (1 - ends)).astype(np.float32)
    return logits


def p_within(hazard_logits: Floats | Singles) -> Floats:
    """P(arrival within each lead) from the hazards of its intervals: [series, K]."""
    bounded = np.clip(np.asarray(hazard_logits, dtype=np.float64), -30, 30)
    quiet = np.reciprocal(1 + np.exp(bounded))
    return 1 - np.cumprod(quiet, axis=1)


def save(weights: NetworkWeights, path: Path) -> None:
    """Write them beside the path and rename, so that a reader never sees half a file."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        arrays = {f.name: getattr(weights, f.name) for f in dataclasses.fields(weights)}
        np.savez(file, feature_names=np.array(NAMES), leads=np.array(LEADS), **arrays)
    partial.replace(path)


def load(path: Path) -> NetworkWeights:
    """Read weights that `save` wrote.

    Raises:
        InputError: the file is not such a file, is damaged, or is of other features or leads.
    """
    remedy = "train the forecaster again"
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if file["feature_names"].tolist() != list(NAMES) or file["leads"].tolist() != [*LEADS]:
                raise InputError(f"{path} was trained on other features: {remedy}")
            names = [field.name for field in dataclasses.fields(NetworkWeights)]
            weights = NetworkWeights(**{name: file[name] for name in names})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read forecaster weights {path} ({error}): {remedy}") from error
    _check(weights, path, remedy)
    return weights


def _check(weights: NetworkWeights, path: Path, remedy: str) -> None:
    num, inner = weights.num_hidden, len(weights.head_bias)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("mean", "scale", "low", "high"), (NUM_FEATURES,)
    )
    shapes |= {
        "input_weights": (NUM_FEATURES, 4 * num),
        "hidden_weights": (num, 4 * num),
        "gate_bias": (4 * num,),
        "head_weights": (num + NUM_FEATURES, inner),
        "out_weights": (inner, 3 * NUM_LEADS),
        "out_bias": (3 * NUM_LEADS,),
        "due_scale": (NUM_LEADS,),
        "exposures": Pool().exposures.shape,
        "events": Pool().events.shape,
    }
    for name, shape in shapes.items():
        array = getattr(weights, name)
        if array.shape != shape or not np.isfinite(array).all():
            raise InputError(f"{path}: {name} is damaged: {remedy}")
