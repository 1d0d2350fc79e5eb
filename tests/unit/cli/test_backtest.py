from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.cli.traces import HEADING, day_of_functions
from typer.testing import CliRunner

from flashserve.cli.main import app
from flashserve.errors import InputError


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["backtest", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_a_published_trace_gives_figures_for_scripts(tmp_path: Path) -> None:
    path = day_of_functions(tmp_path / "day.csv")
    shown = invoke("--trace", str(path), "--models", "ewma-15,hazard", "--json")
    found = json.loads(shown, parse_constant=pytest.fail)  # NaN is not JSON
    assert found["num_fitted"] + found["num_reported"] == 24
    assert (found["fitted_minutes"], found["reported_minutes"]) == (960, 480)
    rows = {row["name"]: row for row in found["rows"]}
    assert {"ewma-15", "hazard", "keep-alive-10", "hybrid-histogram-5-99-240"} <= set(rows)
    assert set(rows["hazard"]["log_loss"]) == {"1", "5", "10", "30"}
    assert rows["hazard"]["log_loss"]["1"] < rows["ewma-15"]["log_loss"]["1"]
    assert rows["keep-alive-10"]["cost"]["10"] == pytest.approx(1)


def test_a_page_has_every_drawing_and_needs_nothing_else(tmp_path: Path) -> None:
    path = day_of_functions(tmp_path / "day.csv")
    page = tmp_path / "<&>.html"
    shown = invoke("--trace", str(path), "--models", "ewma-15", "--html", str(page))
    assert "ewma-15" in shown
    assert str(page) in shown
    text = page.read_text()
    assert text.count("<svg") == 5
    assert "reported on" in text
    assert "src=" not in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--models", "oracle"], "no forecaster is named oracle"),
        (["--html", "/nowhere/page.html"], "its directory does not exist"),
        ([], "line 2: 5 fields instead of 1444"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    path = tmp_path / "day.csv"
    path.write_text(f"{HEADING}\no,a,f,http,1\n")
    with pytest.raises(InputError, match=reason):
        CliRunner().invoke(
            app, ["backtest", "--trace", str(path), *arguments], catch_exceptions=False
        )
