"""The documentation's tables say what the report says, and nothing where it has nothing."""

import json
import sys
from pathlib import Path

import pytest

import forecast_tables as tables


def row(figure: str, value: float | None, high: float | None, **more: object) -> dict[str, object]:
    said = {"trace": "azure", "model": "auto", "seed": 0, "cohort": "all", "num_series": 3}
    return {**said, "figure": figure, "value": value, "low": 0, "high": high, **more}


def test_a_figure_is_the_median_over_seeds_with_the_worst_bound() -> None:
    figures = tables.Figures(
        [row("cost_5", value, value + 0.1, seed=seed) for seed, value in enumerate((0.5, 0.2, 0.3))]
    )
    assert figures.said("azure", "auto", "all", "cost_5") == "0.30 (0.60)"
    assert figures.said("azure", "auto", "all", "cost_5", bound=False) == "0.30"
    assert figures.said("azure", "auto", "all", "cost_10") == "-"


def test_a_bound_that_is_not_finite_is_said() -> None:
    figures = tables.Figures([row("cost_5", 0.5, None), row("cost_10", None, None)])
    assert figures.said("azure", "auto", "all", "cost_5") == "0.50 (none)"
    assert figures.said("azure", "auto", "all", "cost_10") == "-"


def test_a_report_becomes_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        row("cost_5", 0.4, 0.5),
        row("cost_5", 0.7, 0.8, cohort="rare"),
        row("pinball_90_1", 0.9, 1.0, cohort="busy"),
        row("logloss_1", 0.6, 0.7, trace="azure (2 series)", model="auto/prophet-lstm"),
        row("mae_day", 0.95, 1.01, trace="all traces", model="decomposition/prophet"),
    ]
    values = {"azure_cost_5": {"value": 0.5, "aim": 0.8, "met": True}}
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"rows": rows, "values": values}))
    monkeypatch.setattr(sys, "argv", ["forecast_tables.py", str(report)])
    tables.main()
    said = capsys.readouterr().out
    for line in (
        "| `auto` | - | - | 0.40 (0.50) | - | - | - |",
        "| Azure functions, rare (3) | - | - | - | - | 0.70 (0.80) | - | - | - |",
        "| all traces (3) | 0.95 (1.01) | - |",
        "| `azure_cost_5` | 0.5 | 0.8 | yes |",
    ):
        assert line in said
    assert "azure (2 series)" in said
