from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from flashserve.cli import savings as command
from flashserve.control.ledger import AHEAD, Series
from flashserve.control.usage import WorkerUsage
from flashserve.live.savingsreport import make_report
from flashserve.live.usagerows import Accounts, Compared
from flashserve.policy.cost import Prices
from flashserve.types import ModelId

M = ModelId("team/qwen3-32b-fp8")


def report(**accounts: Any) -> dict[str, Any]:
    made = make_report(Accounts(**accounts), "flashserve", Prices(), 20_000, {"odd": "it broke"})
    body: dict[str, Any] = json.loads(msgspec.json.encode(made))
    return body


LIVE = WorkerUsage(idle_s=95_000.0)
BUSY = report(
    usage={
        Series(M, "", "acme"): WorkerUsage(5000.0, 12.5, 90_000.0, 20.0, 1234, 56, 3),
        Series(M, "tone", ""): WorkerUsage(50.0, 0.0, 9.0, 0.0, 12),
        Series(ModelId("b"), "", AHEAD): WorkerUsage(idle_s=700_000.0),
    },
    compared={
        ("always-on", M): Compared(WorkerUsage(5000.0, 0.5, 600_000.0, 0.0, 1246), LIVE),
        ("histogram", M): Compared(WorkerUsage(5000.0, 0.5, 80_000.0, 0.0, 1246), LIVE),
    },
)


class FakeClient:
    def __init__(self, body: dict[str, Any]) -> None:
        self._body = body

    def savings(self, days: int) -> dict[str, Any]:
        assert days == 3
        return self._body


def run(monkeypatch: pytest.MonkeyPatch, body: dict[str, Any], *, as_json: bool = False) -> None:
    @contextlib.contextmanager
    def connect(_: str | None) -> Iterator[FakeClient]:
        yield FakeClient(body)

    monkeypatch.setattr(command, "connect", connect)
    command.savings(days=3, as_json=as_json)


def test_the_report_fits_a_terminal_of_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run(monkeypatch, BUSY)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0] == "policy flashserve, since 2024-10-04 (UTC)"
    assert lines[1] == "prices in USD: a worker (an accelerator) 3 an hour"
    assert max(map(len, lines)) <= 80
    for word in ("total", "acme", "default", "(ahead of requests)", "always-on", "25.0 h", "(84%)"):
        assert word in shown, word
    assert "-8.33 (-12%)" in shown
    assert lines[-1] == "odd failed as a shadow and counts no more: it broke"


def test_a_server_without_traffic_says_so_in_dashes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, report())
    assert "total" in capsys.readouterr().out


def test_scripts_get_the_whole_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, BUSY, as_json=True)
    assert json.loads(capsys.readouterr().out) == BUSY
