"""Fine-tunes the network for a running server: `python -m flashserve.forecast.network.tune FOLDER`.

The last part of the history is held out: neither the old weights nor the new ones were fitted to
it. Both forecast it, minute by minute as the server does, and whoever asked takes the better ones.
See `tuning` for what is in the folder.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flashserve.forecast.core import Floats, FollowingModel, known_counts
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.limits import bound
from flashserve.forecast.network.model import NetworkModel
from flashserve.forecast.network.process import TrainSettings
from flashserve.forecast.network.weights import NetworkWeights
from flashserve.forecast.scores import arrivals_within, log_loss

SCORED_LEADS = (1, 5, 10, 30)
"""Minutes."""


def held_out_loss(
    model: FollowingModel,
    counts: Floats,
    start: int,
    num_held: int,
    leads: Sequence[int] = SCORED_LEADS,
) -> float:
    """Mean -log of the chances that the model gave to what happened in the last `num_held` minutes.

    counts: [series, minutes] from minute `start` on, NaN where not known. Every series counts alike
    that has a minute to count. NaN when nothing of it is known.
    """
    first = counts.shape[1] - num_held
    happened = arrivals_within(counts.astype(np.float32), first, leads)
    losses = np.full(happened.shape, np.nan)
    follower = model.follow([""] * len(counts), start)
    for minute, column in enumerate(counts.T):
        if minute >= first:
            p = follower.forecast(leads).p_arrival
            losses[:, minute - first] = log_loss(p, happened[:, minute - first])
        follower.advance(column)
    is_known = np.isfinite(losses)
    num_known = is_known.sum(axis=(1, 2))
    total = np.where(is_known, losses, 0.0).sum(axis=(1, 2))
    has_any = num_known > 0
    if not has_any.any():
        return float("nan")
    return float((total[has_any] / num_known[has_any]).mean())


def tune(
    counts: Floats,
    start: int,
    num_held: int,
    settings: TrainSettings,
    begin: NetworkWeights | None,
) -> tuple[NetworkWeights, dict[str, float]]:
    """New weights, and the held-out losses: `new` of them, `old` of `begin` or of gaps alone."""
    from flashserve.forecast.network.train import train

    learnt = counts[:, : counts.shape[1] - num_held]
    trained = train(learnt, start, np.ones(len(counts)), settings, begin)
    old: FollowingModel
    if begin is not None:
        old = NetworkModel(begin)
    else:
        old = HazardModel()
        old.pool = trained.pool
    losses = {
        "old": held_out_loss(old, counts, start, num_held),
        "new": held_out_loss(NetworkModel(trained), counts, start, num_held),
    }
    return trained, losses


def main(folder: Path) -> None:
    order = json.loads((folder / "order.json").read_text())
    settings = TrainSettings(**order["settings"])
    bound(order["limit_s"], settings.memory_bytes, order["parent_pid"])
    import torch

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    with np.load(folder / "history.npz", allow_pickle=False) as file:
        counts, start = known_counts(file["counts"]), int(file["start"])
    begin = folder / "begin.npz"
    trained, losses = tune(
        counts, start, order["num_held"], settings, files.load(begin) if begin.exists() else None
    )
    files.save(trained, folder / "weights.npz")
    (folder / "losses.json").write_text(json.dumps(losses))


def order_of(settings: TrainSettings, num_held: int, limit_s: int, parent_pid: int) -> str:
    """What `main` reads from order.json."""
    return json.dumps(
        {
            "settings": dataclasses.asdict(settings),
            "num_held": num_held,
            "limit_s": limit_s,
            "parent_pid": parent_pid,
        }
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
