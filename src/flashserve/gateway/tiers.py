"""What nodes say of their tiers, as JSON and as metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from flashserve.store.reporting import StoreReport, TierReport
from flashserve.store.transfers import Fetch
from flashserve.telemetry import TierSample
from flashserve.types import NodeId


def tiers_body(node_id: NodeId, report: StoreReport) -> dict[str, Any]:
    """A node's tiers, the nearest first; one that another process has is left out."""
    return {
        "node": node_id,
        "tiers": [
            {"tier": name, **msgspec.to_builtins(tier)} for name, tier in _tiers(report).items()
        ],
        "arena": msgspec.to_builtins(report.arena),
        "scrub": msgspec.to_builtins(report.scrub),
        "fetches": [_fetch_body(fetch) for fetch in report.fetches],
        "read_bytes": {tier.label: num_bytes for tier, num_bytes in report.read_bytes.items()},
    }


def tier_samples(reports: Mapping[NodeId, StoreReport]) -> Iterator[TierSample]:
    """The same as metrics of Prometheus."""
    for node_id, report in sorted(reports.items()):
        for name, labels, value in _samples(report):
            yield TierSample(name, node_id, labels, value)


def _samples(report: StoreReport) -> Iterator[tuple[str, tuple[str, ...], float]]:
    for name, tier in _tiers(report).items():
        yield "flashserve_tier_bytes", (name, "used"), tier.used_bytes
        yield "flashserve_tier_bytes", (name, "free"), tier.free_bytes
        yield "flashserve_tier_models", (name,), tier.num_models
        yield "flashserve_tier_leases", (name,), tier.num_leases
        yield "flashserve_tier_evictions", (name,), tier.num_evicted
        yield "flashserve_tier_damaged", (name,), tier.num_damaged
        num_fetches = sum(fetch.to_tier.label == name for fetch in report.fetches)
        yield "flashserve_fetches", (name,), num_fetches
    for left, num_bytes in report.read_bytes.items():
        yield "flashserve_read_bytes", (left.label,), num_bytes
    yield "flashserve_arena_prefaulted_bytes", (), report.arena.prefaulted_bytes
    yield "flashserve_arena_huge_page_bytes", (), report.arena.huge_page_bytes
    yield "flashserve_scrub_rounds", (), report.scrub.num_rounds


def _tiers(report: StoreReport) -> dict[str, TierReport]:
    return {"dram": report.dram, **({"disk": report.disk} if report.disk else {})}


def _fetch_body(fetch: Fetch) -> dict[str, Any]:
    """eta_s: seconds until it is done at the rate so far; null before its first bytes."""
    left = fetch.total_bytes - fetch.done_bytes
    return {
        "model": fetch.model_id,
        "source": fetch.source,
        "from": fetch.from_tier.label,
        "to": fetch.to_tier.label,
        "done_bytes": fetch.done_bytes,
        "total_bytes": fetch.total_bytes,
        "bytes_per_s": fetch.bytes_per_s,
        "elapsed_s": fetch.elapsed_s,
        "eta_s": left / fetch.bytes_per_s if fetch.bytes_per_s else None,
    }
