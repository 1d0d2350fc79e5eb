"""Whose waiting request comes next: an index of one model's tenants by their shares.

The rules are policy.admission's; here they are kept true in logarithmic time. Heap entries that no
longer say the truth are dropped when they surface, and all at once when there are too many.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

from flashserve.policy.admission import Load, Turn, excess, turn
from flashserve.types import RequestId

if TYPE_CHECKING:
    from flashserve.control.records import Request

_MAX_STALE = 4
"""Heap entries for each tenant that waits, beyond some."""


class _Tenant:
    __slots__ = ("name", "running", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name, self.weight = name, weight
        self.running = 0
        self.waiting: dict[RequestId, Request] = {}
        """In order of arrival."""

    @property
    def load(self) -> Load:
        """It waits."""
        head = next(iter(self.waiting.values()))
        return Load(self.name, self.weight, self.running, len(self.waiting), head.sequence)


class Shares:
    """Told of every request of the model that begins or ends to wait or to run."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Tenant] = {}
        self._turns: list[Turn] = []
        self._excesses: list[tuple[float, str]] = []

    def wait(self, requests: Iterable[Request]) -> None:
        """They wait from now on; in order of arrival within each tenant."""
        for request in requests:
            tenant = self._tenant(request)
            last = next(reversed(tenant.waiting.values()), None)
            tenant.waiting[request.request_id] = request
            if last and request.sequence < last.sequence:  # it has lost its replica
                ordered = sorted(tenant.waiting.values(), key=lambda request: request.sequence)
                tenant.waiting = {request.request_id: request for request in ordered}
            self._note(tenant)

    def stop_waiting(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        del tenant.waiting[request.request_id]
        self._note(tenant)

    def run(self, request: Request) -> None:
        tenant = self._tenant(request)
        tenant.running += 1
        self._note(tenant)

    def stop_running(self, request: Request) -> None:
        tenant = self._tenants[request.tenant]
        tenant.running -= 1
        self._note(tenant)

    def next(self) -> Request | None:
        """The request that is dispatched next; None when none waits."""
        if len(self._tenants) == 1:  # nothing to compare, and nothing is noted
            [only] = self._tenants.values()
            return next(iter(only.waiting.values()), None)
        while self._turns:
            top = self._turns[0]
            tenant = self._tenants.get(top.tenant)
            if tenant and tenant.waiting and turn(tenant.load) == top:
                return next(iter(tenant.waiting.values()))
            heapq.heappop(self._turns)
        return None

    def most(self) -> Load | None:
        """The tenant whose waiting requests exceed its share the most; None when none waits."""
        if len(self._tenants) == 1:
            [only] = self._tenants.values()
            return only.load if only.waiting else None
        while self._excesses:
            top = self._excesses[0]
            tenant = self._tenants.get(top[1])
            if tenant and tenant.waiting and _excess_key(tenant.load) == top:
                return tenant.load
            heapq.heappop(self._excesses)
        return None

    def num_waiting(self, tenant: str) -> int:
        known = self._tenants.get(tenant)
        return len(known.waiting) if known else 0

    def last_of(self, tenant: str) -> Request | None:
        """Its latest request of which nothing was answered yet; None when there is none."""
        waiting = reversed(self._tenants[tenant].waiting.values())
        return next((request for request in waiting if request.dispatched_at is None), None)

    def _tenant(self, request: Request) -> _Tenant:
        known = self._tenants.get(request.tenant)
        if known is None:
            known = self._tenants[request.tenant] = _Tenant(request.tenant, request.weight)
            if len(self._tenants) == 2:
                self._renew_turns()
                self._renew_excesses()
        elif not known.running and not known.waiting:
            known.weight = request.weight
        return known

    def _note(self, tenant: _Tenant) -> None:
        """The tenant's numbers have changed."""
        if not tenant.waiting:
            if not tenant.running and len(self._tenants) > 1:  # the last one comes again
                del self._tenants[tenant.name]
            return
        if len(self._tenants) == 1:
            return
        heapq.heappush(self._turns, turn(tenant.load))
        heapq.heappush(self._excesses, _excess_key(tenant.load))
        if len(self._turns) > _MAX_STALE * len(self._tenants) + 64:
            self._renew_turns()
        if len(self._excesses) > _MAX_STALE * len(self._tenants) + 64:
            self._renew_excesses()

    def _renew_turns(self) -> None:
        self._turns = [turn(load) for load in self._loads()]
        heapq.heapify(self._turns)

    def _renew_excesses(self) -> None:
        self._excesses = [_excess_key(load) for load in self._loads()]
        heapq.heapify(self._excesses)

    def _loads(self) -> Iterable[Load]:
        return (tenant.load for tenant in self._tenants.values() if tenant.waiting)


def _excess_key(load: Load) -> tuple[float, str]:
    return -excess(load.waiting, load.weight), load.tenant
