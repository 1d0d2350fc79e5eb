"""Keeps the accounts: what this server took, and what other policies would have taken.

A ledger and the shadows watch every event of the runtime. Each minute what they counted goes to the
catalogue, by day. A killed server loses at most that minute; shadows start anew with the server,
with nothing warm. While the server is down nobody takes anything.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

import structlog

from flashserve.control.ledger import Ledger, Series
from flashserve.control.shadow import Shadow
from flashserve.control.usage import WorkerUsage
from flashserve.errors import CatalogueError
from flashserve.live.catalogue import Catalogue
from flashserve.live.savingsreport import Report, make_report
from flashserve.live.usagerows import Accounts, Compared, ShadowSeries
from flashserve.messages.commands import Command
from flashserve.messages.events import Event, ModelDeleted, ModelDeployed
from flashserve.policy.cost import Prices
from flashserve.types import ModelId

FLUSH_S = 60.0
KEPT_DAYS = 35
_DAY_S = 86_400
_log = structlog.get_logger(__name__)


class Savings:
    """`observe` is the runtime's; everything else is called in the same loop.

    Args:
        policy: the name of the policy that runs.
        now: the time that events are observed at.
    """

    def __init__(
        self,
        policy: str,
        shadows: Sequence[Shadow],
        prices: Prices,
        catalogue: Catalogue,
        now: Callable[[], float],
        unix_time: Callable[[], float] = time.time,
    ) -> None:
        self.policy = policy
        self.broken: dict[str, str] = {}
        """Shadows that failed, by policy, with the reason; they count no more."""
        self.since_start = Accounts()
        """For metrics; adapters count with their base. Of models that are deployed."""
        self._ledger: Ledger | None = Ledger(prices.slo_s)
        self._shadows = {shadow.policy.name: shadow for shadow in shadows}
        self.prices = prices
        self._catalogue = catalogue
        self._now = now
        self._unix_time = unix_time
        self._deployed: set[ModelId] = set()
        self._pending: dict[int, Accounts] = {}
        """By day: what was counted and is not written yet."""
        self._dropped_before: int | None = None
        self._flushing = asyncio.Lock()

    def observe(self, event: Event, commands: Sequence[Command], now: float) -> None:
        """One event with what it caused. A shadow that fails is put aside; the server goes on."""
        if isinstance(event, ModelDeployed):
            self._deployed.add(event.model.model_id)
        elif isinstance(event, ModelDeleted):
            self._deployed.discard(event.model_id)
        if self._ledger is not None:
            try:
                self._ledger.observe(event, commands, now)
            except Exception:
                self._ledger = None
                _log.exception("the ledger failed and counts no more", fact=event)
        for name, shadow in list(self._shadows.items()):
            try:
                shadow.observe(event, commands, now)
            except Exception as error:
                self._put_aside(name, error)

    def gather(self) -> None:
        """Take over what was counted up to now."""
        for _ in self._gather():
            pass

    def _gather(self) -> Iterator[None]:
        """In parts of some models, between which events may be observed. Every part begins where
        it ended the last time, so that nothing is lost or counted twice.
        """
        usage = self._ledger.drain(self._now()) if self._ledger is not None else {}
        live = _by_model(usage)
        self._add(Accounts(usage=usage))
        for name in list(self._shadows):
            if shadow := self._shadows.get(name):
                yield from self._gather_shadow(name, shadow, dict(live))

    def _gather_shadow(
        self, name: str, shadow: Shadow, live: dict[ModelId, WorkerUsage]
    ) -> Iterator[None]:
        """live: what the server took meanwhile, as far as it is not compared yet."""
        try:
            for taken in shadow.drain_parts(self._now):
                known = {model: live.pop(model) for model in taken.keys() & live.keys()}
                self._add(Accounts(compared=_compare(name, taken, known)))
                yield
        except Exception as error:
            self._put_aside(name, error)
        else:
            self._add(Accounts(compared=_compare(name, {}, live)))

    def _add(self, accounts: Accounts) -> None:
        """Metrics are only of models that there are, without adapters, so that they do not pile
        up.
        """
        for series, taken in accounts.usage.items():
            if series.model_id in self._deployed:
                self.since_start.add_usage(series._replace(adapter=""), taken)
        for key, compared in accounts.compared.items():
            if key[1] in self._deployed:
                self.since_start.add_compared(key, compared)
        if waiting := self._pending.get(self._today):
            waiting.add(accounts)
        else:
            self._pending[self._today] = accounts

    async def flush(self) -> None:
        """Write what was counted. What cannot be written is kept for the next time, and logged."""
        async with self._flushing:
            for _ in self._gather():
                await asyncio.sleep(0)
            while self._pending:
                day, accounts = self._pending.popitem()
                try:
                    await self._catalogue.add_usage(day, accounts)
                except CatalogueError as error:
                    self._pending.setdefault(day, Accounts()).add(accounts)
                    _log.error("usage not recorded", reason=error.message)
                    return
            await self._drop_old()

    async def run(self) -> None:
        """Flush each minute until cancelled."""
        while True:
            await asyncio.sleep(FLUSH_S)
            await self.flush()

    async def report(self, num_days: int) -> Report:
        """Of today and the days before it, `num_days` in all.

        Raises:
            CatalogueError: what was kept cannot be read.
        """
        await self.flush()
        accounts = await self._catalogue.usage(self._today - num_days + 1)
        since = self._today if accounts.first_day is None else accounts.first_day
        return make_report(accounts, self.policy, self.prices, since, self.broken)

    def forget_model(self, model_id: ModelId) -> None:
        """Drop a deleted model from what was counted since the start; its days are kept."""
        usage, compared = self.since_start.usage, self.since_start.compared
        for series in [one for one in usage if one.model_id == model_id]:
            del usage[series]
        for key in [one for one in compared if one[1] == model_id]:
            del compared[key]

    async def _drop_old(self) -> None:
        before = self._today - KEPT_DAYS
        if before == self._dropped_before:
            return
        try:
            await self._catalogue.drop_usage(before)
            self._dropped_before = before
        except CatalogueError as error:
            _log.error("old usage not dropped", reason=error.message)

    def _put_aside(self, name: str, error: Exception) -> None:
        self._shadows.pop(name, None)
        self.broken[name] = f"{type(error).__name__}: {error}"
        _log.error("a shadow failed and counts no more", policy=name, exc_info=error)

    @property
    def _today(self) -> int:
        return int(self._unix_time() // _DAY_S)


def _by_model(usage: dict[Series, WorkerUsage]) -> dict[ModelId, WorkerUsage]:
    sums: dict[ModelId, WorkerUsage] = {}
    for series, taken in usage.items():
        sums.setdefault(series.model_id, WorkerUsage()).add(taken)
    return sums


def _compare(
    policy: str, taken: dict[ModelId, WorkerUsage], live: dict[ModelId, WorkerUsage]
) -> dict[ShadowSeries, Compared]:
    compared = {}
    for model_id in taken.keys() | live.keys():
        shadow, known = taken.get(model_id), live.get(model_id)
        if (shadow is None or shadow.is_nothing) and (known is None or known.is_nothing):
            continue
        own = WorkerUsage()  # `live` is compared with each shadow
        if known is not None:
            own.add(known)
        compared[policy, model_id] = Compared(shadow or WorkerUsage(), own)
    return compared
