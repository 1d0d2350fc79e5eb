"""The savings report: who took what, at which price, and what other policies would have cost."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Mapping

from flashserve.config import DEFAULT_TENANT
from flashserve.control.ledger import AHEAD, Series
from flashserve.control.usage import WorkerUsage
from flashserve.live.usagerows import Accounts
from flashserve.policy.cost import Prices

_AHEAD_NAME = "(ahead of requests)"
_HOUR_S = 3600.0


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """Somebody's share. price: of the workers' seconds; wait_price: of the waiting for starts."""

    name: str
    requests: int
    cold: int
    misses: int
    wait_s: float
    busy_s: float
    loading_s: float
    idle_s: float
    price: float
    wait_price: float


@dataclasses.dataclass(frozen=True, slots=True)
class Against:
    """Another policy on the same traffic.

    live: this server while that shadow watched; saved: what its workers cost less than the
    shadow's would have (negative: more), as a share of the shadow's price in saved_fraction, which
    is None where that is nothing. models: the shadow's lines.
    """

    policy: str
    shadow: Line
    live: Line
    saved: float
    saved_fraction: float | None
    models: tuple[Line, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """since: the first day of which something is counted, in UTC. broken: shadows that failed,
    and why.
    """

    since: str
    policy: str
    prices: Mapping[str, float | str]
    total: Line
    models: tuple[Line, ...]
    adapters: tuple[Line, ...]
    tenants: tuple[Line, ...]
    against: tuple[Against, ...]
    broken: Mapping[str, str]


def make_report(
    accounts: Accounts, policy: str, prices: Prices, first_day: int, broken: Mapping[str, str]
) -> Report:
    """Lines are sorted by price, the largest first."""

    def lines(name_of: Callable[[Series], str | None]) -> tuple[Line, ...]:
        sums: dict[str, WorkerUsage] = {}
        for series, usage in accounts.usage.items():
            if (name := name_of(series)) is not None:
                sums.setdefault(name, WorkerUsage()).add(usage)
        return _lines(sums, prices)

    total = _sum(accounts.usage.values())
    return Report(
        since=datetime.date.fromordinal(
            datetime.date(1970, 1, 1).toordinal() + first_day
        ).isoformat(),
        policy=policy,
        prices=price_table(prices),
        total=_line("total", total, prices),
        models=lines(lambda series: series.model_id),
        adapters=lines(lambda s: f"{s.model_id}:{s.adapter}" if s.adapter else None),
        tenants=lines(lambda series: _tenant_name(series.tenant)),
        against=tuple(_against(accounts, name, prices) for name in _policies(accounts)),
        broken=dict(broken),
    )


def price_table(prices: Prices) -> dict[str, float | str]:
    """What the lines were reckoned with, under the names of the settings; worker: in words."""
    return {
        "currency": prices.currency,
        "worker": prices.worker_text,
        "gpu_per_hour": round(prices.gpu_per_s * _HOUR_S, 9),
        "wait_per_s": prices.wait_per_s,
        "slo_miss": prices.slo_miss,
        "slo_s": prices.slo_s,
    }


def _policies(accounts: Accounts) -> list[str]:
    return sorted({policy for policy, _ in accounts.compared})


def _against(accounts: Accounts, policy: str, prices: Prices) -> Against:
    pairs = {model: pair for (name, model), pair in accounts.compared.items() if name == policy}
    shadow = _line(policy, _sum(pair.shadow for pair in pairs.values()), prices)
    live = _line("live", _sum(pair.live for pair in pairs.values()), prices)
    saved = shadow.price - live.price
    models = _lines({model: pair.shadow for model, pair in pairs.items()}, prices)
    fraction = saved / shadow.price if shadow.price > 0 else None
    return Against(policy, shadow, live, saved, fraction, models)


def _tenant_name(tenant: str) -> str:
    return _AHEAD_NAME if tenant == AHEAD else tenant or DEFAULT_TENANT


def _sum(usages: Iterable[WorkerUsage]) -> WorkerUsage:
    total = WorkerUsage()
    for usage in usages:
        total.add(usage)
    return total


def _lines(sums: Mapping[str, WorkerUsage], prices: Prices) -> tuple[Line, ...]:
    found = [_line(name, usage, prices) for name, usage in sums.items()]
    return tuple(sorted(found, key=lambda line: (-line.price, line.name)))


def _line(name: str, usage: WorkerUsage, prices: Prices) -> Line:
    return Line(
        name,
        usage.requests,
        usage.cold,
        usage.misses,
        usage.wait_s,
        usage.busy_s,
        usage.loading_s,
        usage.idle_s,
        usage.worker_price(prices),
        usage.wait_price(prices),
    )
