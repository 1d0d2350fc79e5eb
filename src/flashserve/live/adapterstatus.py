"""What an adapter's line of `flashserve adapter list` says."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from flashserve.config import Settings
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.adapters import Adapters, Use
from flashserve.live.modelrows import DeployedModel
from flashserve.live.requests import AdapterStatus
from flashserve.live.status import ask
from flashserve.node.client import AdapterResidence, Node
from flashserve.policy.cost import Prices
from flashserve.policy.multiplexing import AdapterLoad, Machine, advise, in_workers
from flashserve.types import AdapterId, Tier

_BYTES_PER_S = 10e9
"""At which a step reads weights, where nobody measured it: host memory by a few threads."""


async def gather_adapter_stats(nodes: Sequence[Node]) -> dict[AdapterId, AdapterResidence]:
    """Where each adapter's bytes are on the node that has them nearest; see status.gather_stats."""
    found: dict[AdapterId, AdapterResidence] = {}
    for node in nodes:
        stats = await ask(node)
        for adapter_id, residence in stats.adapters.items() if stats else ():
            known = found.get(adapter_id)
            if known is None or known.tier < residence.tier:
                found[adapter_id] = residence
    return found


def adapter_status(
    adapter: RegisteredAdapter,
    base: DeployedModel,
    adapters: Adapters,
    stats: Mapping[AdapterId, AdapterResidence],
    settings: Settings,
    prices: Prices,
) -> AdapterStatus:
    """One adapter now."""
    now, spec = time.monotonic(), adapter.spec
    use = adapters.uses.get(adapter.name, Use(now))
    residence = stats.get(adapter.adapter_id)
    keep_alive_s = base.spec.keep_alive_s
    machine = Machine(
        adapter_bytes=spec.size_bytes,
        base_bytes=base.spec.size_bytes,
        bytes_per_s=_BYTES_PER_S,
        batch=settings.engine.max_batch_sequences,
        keep_alive_s=settings.policy.keep_alive_s if keep_alive_s is None else keep_alive_s,
    )
    advice = advise(_load(adapter, adapters, use, now), machine, in_workers(prices))
    return AdapterStatus(
        name=adapter.name,
        base=spec.base,
        version=spec.version,
        source=spec.source,
        rank=adapter.rank,
        num_parameters=adapter.num_parameters,
        targets=adapter.targets,
        size_bytes=spec.size_bytes,
        tier=residence.tier if residence else Tier.DISK,
        dram_bytes=residence.dram_bytes if residence else 0,
        in_flight=adapters.num_users(adapter.adapter_id),
        requests=use.num_requests,
        tokens=use.num_tokens,
        last_used_s=now - use.last_at if use.num_requests else None,
        advice=advice.choice.value,
        reason=advice.reason,
        created_at=adapter.created_at,
    )


def _load(adapter: RegisteredAdapter, adapters: Adapters, use: Use, now: float) -> AdapterLoad:
    """Rates since the adapter's first request, and those of everything else on its base."""
    observed_s = max(now - use.since, 1e-9)
    rest_requests = rest_tokens = 0.0
    for name in (adapter.spec.base, *adapters.of(adapter.spec.base)):
        if name != adapter.name and (other := adapters.uses.get(name)) is not None:
            other_s = max(now - other.since, 1.0)
            rest_requests += other.num_requests / other_s
            rest_tokens += other.num_tokens / other_s
    if not use.num_requests:
        return AdapterLoad(0.0, 0.0, 0.0, rest_requests, rest_tokens)
    return AdapterLoad(
        observed_s,
        use.num_requests / observed_s,
        use.num_tokens / observed_s,
        rest_requests,
        rest_tokens,
    )
