"""What models took while a simulation ran: seconds of workers, bytes by tier, and who is where."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import numpy as np

from flashserve.sim.results import Spent, Timeline
from flashserve.types import ModelId, ModelSpec, Tier

_GB = 1e9
_NEAREST_FIRST = (Tier.DEVICE, Tier.DRAM, Tier.DISK)


class Use(enum.IntEnum):
    """What a worker does for a model."""

    LOADING = 0
    BUSY = 1
    IDLE = 2


class Account:
    """One model's sums. A use that goes on is counted when it ends, or at `Ledger.close`."""

    __slots__ = ("disk_b_s", "dram_b_s", "lowest", "num_holders", "seconds")

    def __init__(self, lowest: Tier) -> None:
        self.lowest = lowest
        self.seconds = [0.0, 0.0, 0.0]
        self.dram_b_s = self.disk_b_s = 0.0
        self.num_holders = [0, 0, 0, 0]
        """Nodes (of DEVICE: replicas) that hold it, by tier."""

    @property
    def tier(self) -> Tier:
        for tier in _NEAREST_FIRST:
            if self.num_holders[tier]:
                return tier
        return self.lowest


class Ledger:
    """Told by nodes of every change; sampled by the loop."""

    def __init__(self) -> None:
        self.accounts: dict[ModelId, Account] = {}
        self.num_workers = [0, 0, 0]
        """By use, now."""
        self.num_models = [0, 0, 0, 0]
        """By the best tier that holds them, now."""
        self._at: list[float] = []
        self._samples: list[tuple[int, ...]] = []

    def add_model(self, spec: ModelSpec) -> Account:
        """Count a model from now on, if it is not counted yet."""
        account = self.accounts.get(spec.model_id)
        if account is None:
            account = self.accounts[spec.model_id] = Account(spec.lowest_tier)
            self.num_models[spec.lowest_tier] += 1
        return account

    def hold(self, account: Account, tier: Tier, change: int) -> None:
        """One more (+1) or less (-1) holds the model in `tier`."""
        before = account.tier
        account.num_holders[tier] += change
        after = account.tier
        if after is not before:
            self.num_models[before] -= 1
            self.num_models[after] += 1

    def sample(self, now: float) -> None:
        self._at.append(now)
        self._samples.append((*self.num_models, *self.num_workers))

    def spent(self, models: Sequence[ModelId]) -> Spent:
        """Sums of these models, in their order; zero for one that nobody told of."""
        unknown = Account(Tier.REMOTE)
        accounts = [self.accounts.get(model_id, unknown) for model_id in models]
        return Spent(
            busy_s=np.array([a.seconds[Use.BUSY] for a in accounts]),
            loading_s=np.array([a.seconds[Use.LOADING] for a in accounts]),
            idle_s=np.array([a.seconds[Use.IDLE] for a in accounts]),
            dram_gb_s=np.array([a.dram_b_s / _GB for a in accounts]),
            disk_gb_s=np.array([a.disk_b_s / _GB for a in accounts]),
        )

    def timeline(self) -> Timeline:
        rows = np.array(self._samples, dtype=np.int32).reshape(-1, 7)
        return Timeline(
            at=np.array(self._at),
            tiers=rows[:, :4],
            loading=rows[:, 4 + Use.LOADING],
            busy=rows[:, 4 + Use.BUSY],
            idle=rows[:, 4 + Use.IDLE],
        )
