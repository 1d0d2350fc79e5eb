"""What models and tenants took since the server started, as metrics."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flashserve.config import DEFAULT_TENANT
from flashserve.control.usage import WorkerUsage
from flashserve.telemetry import UsageSample

if TYPE_CHECKING:
    from flashserve.live.savings import Savings

_STATES = ("busy", "loading", "idle")


def usage_samples(savings: Savings) -> Iterator[UsageSample]:
    savings.gather()
    models: collections.defaultdict[str, WorkerUsage] = collections.defaultdict(WorkerUsage)
    tenants: collections.defaultdict[str, WorkerUsage] = collections.defaultdict(WorkerUsage)
    shadows: collections.defaultdict[str, WorkerUsage] = collections.defaultdict(WorkerUsage)
    for series, usage in savings.since_start.usage.items():
        models[series.model_id].add(usage)
        tenants[series.tenant or DEFAULT_TENANT].add(usage)
    for (policy, _), compared in savings.since_start.compared.items():
        shadows[policy].add(compared.shadow)
    yield from _seconds("flashserve_worker_seconds", models)
    yield from _seconds("flashserve_tenant_worker_seconds", tenants)
    yield from _seconds("flashserve_shadow_worker_seconds", shadows)
    for policy, usage in shadows.items():
        yield UsageSample("flashserve_shadow_cold_requests", (policy,), usage.cold)


def _seconds(name: str, usages: dict[str, WorkerUsage]) -> Iterator[UsageSample]:
    for label, usage in usages.items():
        for state in _STATES:
            yield UsageSample(name, (label, state), getattr(usage, f"{state}_s"))
