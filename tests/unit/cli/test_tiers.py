from __future__ import annotations

import json
import re
from typing import Any

import pytest

from flashserve.cli.tiers import print_tiers, progress_of

GIB = 1 << 30
TIER = {
    "tier": "dram",
    "total_bytes": 24 * GIB,
    "used_bytes": 20 * GIB,
    "free_bytes": 4 * GIB,
    "num_models": 12,
    "num_leases": 3,
    "num_evicted": 1234,
    "num_damaged": 0,
}
FETCH = {
    "model": "team/base",
    "source": "s3://bucket/base",
    "from": "remote",
    "to": "dram",
    "done_bytes": GIB,
    "total_bytes": 4 * GIB,
    "bytes_per_s": GIB / 2,
    "elapsed_s": 2.0,
    "eta_s": 6.0,
}


def node(**changed: Any) -> dict[str, Any]:
    return {
        "node": "local",
        "tiers": [TIER, {**TIER, "tier": "disk", "total_bytes": 500 * GIB}],
        "arena": {
            "total_bytes": 25 * GIB,
            "prefaulted_bytes": GIB,
            "is_prefaulting": True,
            "huge_page_bytes": 0,
            "numa_nodes": [],
            "refusals": [],
        },
        "scrub": {
            "rate_bytes_per_s": 100,
            "done_bytes": GIB,
            "round_bytes": 20 * GIB,
            "num_rounds": 2,
            "ended_s": 300.0,
        },
        "fetches": [],
        "read_bytes": {"remote": 0, "disk": 0},
        **changed,
    }


def printed(capsys: pytest.CaptureFixture[str], *nodes: dict[str, Any]) -> list[str]:
    print_tiers(list(nodes), as_json=False)
    return capsys.readouterr().out.splitlines()


def test_each_tier_has_a_line_and_the_rest_follows(capsys: pytest.CaptureFixture[str]) -> None:
    heading, dram, disk, *rest = printed(capsys, node())
    assert heading.split() == [
        *("tier", "total_bytes", "used_bytes", "free_bytes"),
        *("models", "leases", "evicted", "damaged"),
    ]
    assert " ".join(dram.split()) == "dram 24.0 GiB 20.0 GiB 4.0 GiB 12 3 1234 0"
    assert disk.split()[:3] == ["disk", "500.0", "GiB"]
    assert rest == [
        "arena: 1.0 GiB of 25.0 GiB pre-faulted so far, 0 B in huge pages",
        "scrub: 1.0 GiB of 20.0 GiB in this round, the last ended 5 min ago",
    ]


def test_what_is_fetched_shows_progress_rate_and_the_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    starting = {**FETCH, "model": "new", "bytes_per_s": 0.0, "eta_s": None, "done_bytes": 0}
    lines = printed(capsys, node(fetches=[FETCH, starting]))
    assert lines[-2:] == [
        "team/base: 1.0 GiB of 4.0 GiB to dram, 512.0 MiB/s, 6 s left, from s3://bucket/base",
        "new: 0 B of 4.0 GiB to dram, 0 B/s, from s3://bucket/base",
    ]


def test_several_nodes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, node(node="a"), node(node="b"))
    assert lines[0].startswith("node")
    assert [line.split()[0] for line in lines[1:]] == ["a", "a", "b", "b", "a", "a", "b", "b"]


def test_what_the_kernel_refused_and_what_is_off_is_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arena = {
        "prefaulted_bytes": 0,
        "is_prefaulting": False,
        "huge_page_bytes": 0,
        "numa_nodes": [0, 1],
        "refusals": ["huge pages: Invalid argument"],
    }
    lines = printed(capsys, node(arena=arena, scrub={"rate_bytes_per_s": 0}))
    assert lines[-2] == (
        "arena: not pre-faulted, 0 B in huge pages, spread over 2 NUMA nodes; "
        "huge pages: Invalid argument"
    )
    assert lines[-1] == "scrub: off"


def test_a_terminal_of_80_columns_holds_the_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    lines = printed(capsys, node())
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in lines]
    assert max(map(len, shown)) <= 80


def test_json_is_what_the_server_said(capsys: pytest.CaptureFixture[str]) -> None:
    print_tiers([node()], as_json=True)
    assert json.loads(capsys.readouterr().out) == [node()]


def test_progress_is_of_one_model_on_all_nodes() -> None:
    other = {**FETCH, "model": "other"}
    nodes = [node(fetches=[FETCH, other]), node(fetches=[FETCH])]
    assert progress_of(nodes, "team/base") == (2 * GIB, 8 * GIB)
    assert progress_of(nodes, "cold") is None
