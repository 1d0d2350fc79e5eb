"""What the forecaster keeps in the data directory: its state, and the network's trained weights."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flashserve.forecast.network import weights as weightfiles
from flashserve.forecast.network.weights import NetworkWeights

FOLDER = "forecast"


class ForecastFiles:
    """Each is written beside its name and then put in its place: a crash leaves the old or the new.

    Writing raises OSError, and what was there is as it was.
    """

    def __init__(self, data_dir: Path) -> None:
        self._folder = data_dir / FOLDER
        self.state_path = self._folder / "state.npz"
        self.weights_path = self._folder / "weights.npz"
        self._training_path = self._folder / "training.json"

    def write_state(self, state: Mapping[str, Any]) -> None:
        self._make()
        partial = self.state_path.with_name("state.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **state)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(self.state_path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            raise

    def read_state(self) -> dict[str, Any] | None:
        """None when there is none.

        Raises:
            Exception: of many kinds, for what is damaged can look like anything.
        """
        try:
            with self.state_path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        except FileNotFoundError:
            return None

    def drop_state(self) -> None:
        self.state_path.unlink(missing_ok=True)

    def write_weights(self, weights: NetworkWeights) -> None:
        self._make()
        weightfiles.save(weights, self.weights_path)

    def read_weights(self) -> NetworkWeights | None:
        """None when there are none; raises as `read_state` does."""
        return weightfiles.load(self.weights_path) if self.weights_path.exists() else None

    def write_training(self, report: Mapping[str, Any]) -> None:
        """What became of the last training."""
        self._make()
        partial = self._training_path.with_name("training.partial")
        partial.write_text(json.dumps(report))
        partial.replace(self._training_path)

    def read_training(self) -> dict[str, Any]:
        """Empty when there was none, or when it cannot be read: then one is due."""
        try:
            report = json.loads(self._training_path.read_text())
        except (OSError, ValueError):
            return {}
        return report if isinstance(report, dict) else {}

    def _make(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
