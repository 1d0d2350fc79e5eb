"""The bytes of a modelled node: moves between its tiers, within its budgets of DRAM and disk.

What a remote source gives goes straight to DRAM and is written to disk as it comes, as the store
does it; when the disk's budget is full, what was used longest ago leaves. Models whose source is a
directory of the machine take nothing of the disk's budget.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

from flashserve.policy.cost import extent_bytes
from flashserve.sim.ledger import Account, Ledger
from flashserve.sim.links import CallAt, Link, Move
from flashserve.sim.profiles import Speeds
from flashserve.types import ModelId, ModelSpec, Tier

Done = Callable[[float], None]


@dataclasses.dataclass(slots=True, eq=False)
class Resident:
    """A model's bytes in DRAM, or on their way there.

    fetch_s, dram_s: what the move took, from far and from disk; 0 until it is over.
    """

    model: ModelSpec
    num_bytes: int
    account: Account
    since: float
    is_loaded: bool = False
    is_gone: bool = False
    fetch_s: float = 0.0
    dram_s: float = 0.0
    move: Move | None = None
    link: Link | None = None
    waiting: list[Done] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class _Copy:
    """A model's bytes on disk."""

    num_bytes: int
    account: Account
    since: float


class Storage:
    """Args:
    loading: told of a model whose bytes begin to come to DRAM.
    staged: told of bytes that came: model, tier, bytes, seconds.
    left_disk: told of a model that the disk gave up by itself.
    """

    def __init__(
        self,
        call_at: CallAt,
        speeds: Speeds,
        num_workers: int,
        *,
        dram_bytes: int,
        disk_bytes: int,
        ledger: Ledger,
        loading: Callable[[ModelSpec, float], None],
        staged: Callable[[ModelSpec, Tier, int, float, float], None],
        left_disk: Callable[[ModelId, float], None],
    ) -> None:
        total = speeds.dram_total_bytes_per_s or speeds.dram_bytes_per_s * num_workers
        self.remote = Link(call_at, speeds.remote_bytes_per_s)
        self.disk = Link(call_at, speeds.disk_bytes_per_s)
        self.device = Link(call_at, total, speeds.dram_bytes_per_s)
        self._dram_bytes = dram_bytes
        self._disk_bytes = disk_bytes
        self._ledger = ledger
        self._loading = loading
        self._staged = staged
        self._left_disk = left_disk
        self._in_dram: dict[ModelId, Resident] = {}
        self._on_disk: collections.OrderedDict[ModelId, _Copy] = collections.OrderedDict()
        self._fetching: dict[ModelId, list[Done]] = {}
        self.used_bytes = 0  # == sum of residents' bytes, in [0, dram_bytes]
        self.used_disk_bytes = 0  # == sum of copies' bytes, in [0, disk_bytes]

    def get(self, model_id: ModelId) -> Resident | None:
        return self._in_dram.get(model_id)

    def is_on_disk(self, model: ModelSpec) -> bool:
        return model.lowest_tier >= Tier.DISK or model.model_id in self._on_disk

    def hold(self, model: ModelSpec, now: float) -> Resident | None:
        """The model's bytes in DRAM, brought there if they are not; None when they do not fit."""
        if model.model_id in self._on_disk:
            self._on_disk.move_to_end(model.model_id)
        if resident := self._in_dram.get(model.model_id):
            return resident
        num_bytes = extent_bytes(model.size_bytes)
        if self.used_bytes + num_bytes > self._dram_bytes:
            return None
        account = self._ledger.add_model(model)
        resident = Resident(model, num_bytes, account, now)
        self._in_dram[model.model_id] = resident
        self.used_bytes += num_bytes
        on_disk = self.is_on_disk(model)
        resident.link = self.disk if on_disk else self.remote
        resident.move = resident.link.send(
            model.size_bytes, now, lambda at: self._arrived(resident, on_disk, now, at)
        )
        self._loading(model, now)
        return resident

    def evict(self, model_id: ModelId, tier: Tier, now: float) -> None:
        """Out of DRAM, and with DISK from there too; what is on its way is stopped."""
        if resident := self._in_dram.pop(model_id, None):
            self._drop(resident, now)
        if tier is Tier.DISK and (copy := self._on_disk.pop(model_id, None)):
            self._forget_copy(copy, now)

    def fetch(self, model: ModelSpec, now: float, done: Done) -> None:
        """Bring a model to disk; `done` when it is there."""
        if self.is_on_disk(model):
            done(now)
            return
        resident = self._in_dram.get(model.model_id)
        if resident is not None and not resident.is_loaded:
            resident.waiting.append(done)
            return
        waiting = self._fetching.setdefault(model.model_id, [])
        waiting.append(done)
        if len(waiting) == 1:
            self.remote.send(model.size_bytes, now, lambda at: self._fetched(model, now, at))

    def close(self, now: float) -> None:
        """Everything in DRAM and on disk is gone, and nothing moves any more."""
        for link in (self.remote, self.disk, self.device):
            link.close()
        for resident in self._in_dram.values():
            self._drop(resident, now)
        self._in_dram.clear()
        for copy in self._on_disk.values():
            self._forget_copy(copy, now)
        self._on_disk.clear()

    def settle(self, now: float) -> None:
        """Count what is held until now."""
        for resident in self._in_dram.values():
            resident.account.dram_b_s += resident.num_bytes * (now - resident.since)
            resident.since = now
        for model_id, copy in self._on_disk.items():
            copy.account.disk_b_s += copy.num_bytes * (now - copy.since)
            self._on_disk[model_id] = dataclasses.replace(copy, since=now)

    def _arrived(self, resident: Resident, was_on_disk: bool, began_at: float, now: float) -> None:
        model = resident.model
        resident.is_loaded = True
        resident.move = None
        self._ledger.hold(resident.account, Tier.DRAM, 1)
        if was_on_disk:
            resident.dram_s = now - began_at
        else:
            resident.fetch_s = now - began_at
            self._keep(model, resident.fetch_s, now)
        self._staged(model, Tier.DRAM, model.size_bytes, resident.dram_s, now)
        waiting, resident.waiting = resident.waiting, []
        for done in waiting:
            done(now)

    def _fetched(self, model: ModelSpec, began_at: float, now: float) -> None:
        self._keep(model, now - began_at, now)
        for done in self._fetching.pop(model.model_id):
            done(now)

    def _keep(self, model: ModelSpec, seconds: float, now: float) -> None:
        """On disk, if that has room once the longest unused have left."""
        if model.size_bytes > self._disk_bytes or model.model_id in self._on_disk:
            return
        while self.used_disk_bytes + model.size_bytes > self._disk_bytes:
            victim, copy = self._on_disk.popitem(last=False)
            self._forget_copy(copy, now)
            self._left_disk(victim, now)
        account = self._ledger.add_model(model)
        self._on_disk[model.model_id] = _Copy(model.size_bytes, account, now)
        self.used_disk_bytes += model.size_bytes
        self._ledger.hold(account, Tier.DISK, 1)
        self._staged(model, Tier.DISK, model.size_bytes, seconds, now)

    def _drop(self, resident: Resident, now: float) -> None:
        resident.is_gone = True
        self.used_bytes -= resident.num_bytes
        resident.account.dram_b_s += resident.num_bytes * (now - resident.since)
        if resident.is_loaded:
            self._ledger.hold(resident.account, Tier.DRAM, -1)
        elif resident.move is not None and resident.link is not None:
            resident.link.cancel(resident.move, now)

    def _forget_copy(self, copy: _Copy, now: float) -> None:
        self.used_disk_bytes -= copy.num_bytes
        copy.account.disk_b_s += copy.num_bytes * (now - copy.since)
        self._ledger.hold(copy.account, Tier.DISK, -1)
