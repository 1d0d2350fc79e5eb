"""What `flashserve forecast` prints: readable at 80 columns, and never a false certainty."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flashserve.cli import forecast as command
from flashserve.cli.forecast import sparkline
from flashserve.errors import ModelNotFoundError

LEADS = (1, 2, 5, 10, 20, 30, 60)
STATUS: dict[str, Any] = {
    "state": "ready",
    "model": "auto",
    "made_at": 1_790_000_040.0,
    "num_series": 2,
    "num_dropped": 0,
    "reason": "",
    "training": None,
}


def forecast(name: str, p: float, **changed: Any) -> dict[str, Any]:
    chances = [min(p * minutes, 1.0) for minutes in LEADS]
    return {
        "name": name,
        "made_at": 1_790_000_040.0,
        "model": "hazard",
        "why": "cheapest for this series",
        "leads": [
            {
                "lead_s": minutes * 60.0,
                "p_arrival": chance,
                "mean": chance * 2,
                "quantiles": {"0.1": 0.0, "0.5": 1.0, "0.9": 12.0, "0.99": 12345.0},
            }
            for minutes, chance in zip(LEADS, chances, strict=True)
        ],
        "components": {"trend": 0.0123456, "hazard": p},
        **changed,
    }


class FakeClient:
    """Answers as a server that has `found`."""

    def __init__(self, status: dict[str, Any], found: list[dict[str, Any]]) -> None:
        self.status, self.found = status, found

    def __enter__(self) -> FakeClient:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def forecasts(self) -> dict[str, Any]:
        return {"object": "list", "status": self.status, "data": self.found}

    def forecast(self, name: str) -> dict[str, Any]:
        for each in self.found:
            if each["name"] == name:
                return each
        raise ModelNotFoundError(f"model {name} is not deployed")


def printed(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *found: dict[str, Any],
    name: str | None = None,
    as_json: bool = False,
    **status: Any,
) -> str:
    client = FakeClient({**STATUS, **status}, list(found))
    monkeypatch.setattr(command, "connect", lambda _: client)
    command.forecast(name, None, as_json)
    return capsys.readouterr().out


def test_the_table_has_chances_and_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(
        capsys, monkeypatch, forecast("a", 0.02), forecast("team/b:x", 1e-5)
    ).splitlines()
    assert lines[0].split() == [
        *("name", "P_1min", "P_5min", "P_30min", "by_lead", "in_1h", "model", "why")
    ]
    assert lines[1].startswith("a")
    assert " 2.0 %" in lines[1]
    assert "60 %" in lines[1]
    assert "cheapest for this series" in lines[1]
    assert "<0.1 %" in lines[2]
    assert lines[3] == "2 forecast from 14:14 UTC on; the network was not trained yet"


def test_one_forecast_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = printed(capsys, monkeypatch, forecast("a", 0.02), name="a").splitlines()
    assert lines[0] == "a from 2026-09-21 14:14 UTC on"
    assert lines[1] == "by hazard: cheapest for this series"
    assert max(map(len, lines)) < 80
    rows = lines[4:11]
    assert [row.split()[0] for row in rows] == ["1", "2", "5", "10", "20", "30", "1"]
    assert [row.count("█") for row in rows] == [1, 1, 3, 6, 12, 18, 30]
    assert any(line.split() == ["hazard", "2.0", "%"] for line in lines)
    assert any(line.split() == ["trend", "0.0123"] for line in lines)


def test_json_is_what_the_server_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = printed(capsys, monkeypatch, forecast("a", 0.02), name="a", as_json=True)
    assert json.loads(found) == forecast("a", 0.02)
    found = printed(capsys, monkeypatch, as_json=True, num_series=0)
    assert json.loads(found)["status"]["num_series"] == 0


@pytest.mark.parametrize(
    ("status", "line"),
    [
        ({"state": "off"}, "nothing is forecast: forecast.enabled is off"),
        ({"state": "starting"}, "the forecaster is starting: nothing is forecast yet"),
        (
            {"state": "failed", "reason": "no disk"},
            "the forecaster failed and will be tried again: no disk",
        ),
        (
            {"num_series": 0},
            "nothing is forecast yet: forecasts begin with the minute after the first request",
        ),
        (
            {"training": {"at": 1_790_000_000.0, "outcome": "taken"}},
            "2 forecast from 14:14 UTC on; last training 2026-09-21 14:13 UTC: used",
        ),
    ],
)
def test_without_forecasts_it_says_why(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    status: dict[str, Any],
    line: str,
) -> None:
    assert printed(capsys, monkeypatch, **status) == line + "\n"


def test_bars_grow_with_the_chance() -> None:
    assert sparkline([0.0, 0.05, 0.125, 0.5, 0.99, 1.0]) == "  ▁▄██"
    assert sparkline([float(step) / 8 for step in range(9)]) == " ▁▂▃▄▅▆▇█"
