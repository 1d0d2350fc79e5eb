"""What `ps --tiers` prints of the nodes' tiers, and what `stage` follows there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flashserve.cli import console

_COLUMNS: dict[str, Callable[[Any], str]] = {
    "node": str,
    "tier": str,
    "total_bytes": console.human_bytes,
    "used_bytes": console.human_bytes,
    "free_bytes": console.human_bytes,
    "num_models": str,
    "num_leases": str,
    "num_evicted": str,
    "num_damaged": str,
}


def print_tiers(nodes: list[dict[str, Any]], *, as_json: bool) -> None:
    """A table of the tiers, and under it a line for all else that a node says."""
    if as_json:
        console.print_json(nodes)
        return
    rows = [{"node": node["node"], **tier} for node in nodes for tier in node["tiers"]]
    columns = [column for column in _COLUMNS if column != "node" or len(nodes) > 1]
    console.print_table(
        [column.removeprefix("num_") for column in columns],
        [[_COLUMNS[column](row[column]) for column in columns] for row in rows],
        right=[column.removeprefix("num_") for column in columns if column not in ("node", "tier")],
        fold=["node"],
    )
    for node in nodes:
        whose = f"{node['node']} " if len(nodes) > 1 else ""
        for line in _lines(node):
            console.print_line(whose + line)


def progress_of(nodes: Sequence[dict[str, Any]], name: str) -> tuple[int, int] | None:
    """Bytes done and in all of what is being fetched of a model; None when nothing is."""
    fetches = [fetch for node in nodes for fetch in node["fetches"] if fetch["model"] == name]
    if not fetches:
        return None
    return (
        sum(fetch["done_bytes"] for fetch in fetches),
        sum(fetch["total_bytes"] for fetch in fetches),
    )


def _lines(node: dict[str, Any]) -> Iterator[str]:
    yield _arena_line(node)
    yield _scrub_line(node["scrub"])
    for fetch in node["fetches"]:
        yield _fetch_line(fetch)


def _arena_line(node: dict[str, Any]) -> str:
    arena = node["arena"]
    huge = console.human_bytes(arena["huge_page_bytes"])
    if not arena["prefaulted_bytes"] and not arena["is_prefaulting"]:
        taken = "not pre-faulted"
    else:
        done = console.human_bytes(arena["prefaulted_bytes"])
        goes_on = " so far" if arena["is_prefaulting"] else ""
        total = console.human_bytes(arena["total_bytes"])
        taken = f"{done} of {total} pre-faulted{goes_on}"
    parts = [taken, f"{huge} in huge pages"]
    if nodes := arena["numa_nodes"]:
        parts.append(f"spread over {len(nodes)} NUMA nodes")
    return "; ".join(["arena: " + ", ".join(parts), *arena["refusals"]])


def _scrub_line(scrub: dict[str, Any]) -> str:
    if not scrub["rate_bytes_per_s"]:
        return "scrub: off"
    done, total = (console.human_bytes(scrub[key]) for key in ("done_bytes", "round_bytes"))
    ended = None if scrub["ended_s"] is None else console.human_age(scrub["ended_s"])
    last = "none complete yet" if ended is None else f"the last ended {ended} ago"
    return f"scrub: {done} of {total} in this round, {last}"


def _fetch_line(fetch: dict[str, Any]) -> str:
    done, total = (console.human_bytes(fetch[key]) for key in ("done_bytes", "total_bytes"))
    rate, eta = console.human_bytes(fetch["bytes_per_s"]), fetch["eta_s"]
    left = "" if eta is None else f", {console.human_age(eta)} left"
    return (
        f"{fetch['model']}: {done} of {total} to {fetch['to']}, {rate}/s{left}, "
        f"from {fetch['source']}"
    )
