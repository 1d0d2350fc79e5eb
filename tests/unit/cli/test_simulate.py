from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.unit.cli.traces import HEADING, day_of_functions
from typer.testing import CliRunner

from flashserve.cli.main import app
from flashserve.errors import InputError
from flashserve.policy import text


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


SMALL = ("--models", "6", "--requests", "200", "--hours", "2")


def test_a_trace_gives_figures_for_scripts_and_the_same_ones_again(tmp_path: Path) -> None:
    trace = day_of_functions(tmp_path / "day.csv")
    policies = ("--policy", "always-on,keep-alive-60s,flashserve,oracle")
    shown = invoke("--trace", str(trace), *SMALL, *policies, "--json")
    found = json.loads(shown)
    rows = {row["policy"]: row for row in found["policies"]}
    assert list(rows) == ["always-on", "keep-alive-60s", "flashserve", "oracle"]
    requests = {row["answers"]["requests"] for row in rows.values()}
    assert len(requests) == 1
    assert rows["keep-alive-60s"]["costs"]["idle_h"] < rows["always-on"]["costs"]["idle_h"]
    assert (
        rows["always-on"]["answers"]["cold_share"] < rows["keep-alive-60s"]["answers"]["cold_share"]
    )
    again = json.loads(invoke("--trace", str(trace), *SMALL, *policies, "--json"))
    for each in (*found["policies"], *again["policies"]):
        each.pop("wall_s")
    assert again == found


def test_without_a_trace_it_says_that_functions_are_made_up_and_writes_a_page(
    tmp_path: Path,
) -> None:
    page = tmp_path / "<&>.html"
    shown = invoke(*SMALL, "--policy", "keep-alive-60s,histogram", "--html", str(page))
    assert "No trace was given" in shown
    assert str(page) in shown
    written = page.read_text()
    assert written.count('<section class="policy"') == 2
    assert "made up" in written


@pytest.mark.parametrize(
    ("profile", "size", "per_hour"),
    [("this", 269_000_000, 2 * 0.04048), ("8xh100", 14 * 10**9, 3.0)],
)
def test_models_and_prices_are_those_of_the_profile(
    profile: str, size: int, per_hour: float
) -> None:
    arguments = (*SMALL, "--policy", "keep-alive-60s", "--profile", profile)
    found = json.loads(invoke(*arguments, "--json"))
    assert found["prices"]["gpu_per_s"] * 3600 == pytest.approx(per_hour)
    assert found["policies"][0]["answers"]["rejected"] == 0
    assert f"{text.size(size)} with" in found["text"]
    [line] = [line for line in invoke(*arguments).splitlines() if line.startswith("prices: ")]
    assert f"{per_hour:g} an hour" in line


def test_a_price_that_was_set_counts_for_every_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSERVE_PRICE__GPU_PER_HOUR", "1.25")
    for profile in ("this", "8xh100"):
        arguments = (*SMALL, "--policy", "keep-alive-60s", "--profile", profile, "--json")
        assert json.loads(invoke(*arguments))["prices"]["gpu_per_s"] * 3600 == 1.25


def test_a_table_fits_80_columns() -> None:
    lines = invoke(*SMALL, "--policy", "keep-alive-3600s").splitlines()
    table = [line for line in lines if line.startswith(("policy ", "keep-alive-3600s "))]
    assert len(table) == 2
    assert max(map(len, table)) <= 80


def test_a_forecaster_may_be_fitted_on_another_trace(tmp_path: Path) -> None:
    trace = day_of_functions(tmp_path / "day.csv")
    arguments = ("--policy", "flashserve", "--fit-trace", str(trace))
    assert "fitted on day.csv" in invoke("--trace", str(trace), *SMALL, *arguments)


def test_any_forecaster_may_speak() -> None:
    arguments = ("--policy", "flashserve", "--forecaster", "ewma-15")
    assert "Forecasts are by ewma-15, fitted on other synthetic functions" in invoke(
        *SMALL, *arguments
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--policy", "psychic"], "no policy is named 'psychic'; there are flashserve"),
        (["--policy", "oracle,oracle"], "the policy oracle is named twice"),
        (["--forecaster", "crystal-ball"], "no forecaster is named crystal-ball; there are"),
        (["--profile", "abacus"], "no profile abacus: name one of this, 8xh100"),
        (["--html", "/nowhere/page.html"], "its directory does not exist"),
        (["--trace", "{trace}"], "line 2: 5 fields instead of 1444"),
        (["--hours", "25"], "--hours 25 is more than the 24 hours that there are"),
        (["--hours", "nan"], "--hours nan is no positive number"),
        (["--nodes", "100000"], "--nodes 100000 is more than 10000"),
        (["--models", "1000000000"], "more than fits in memory: at most 208333, or fewer --hours"),
        (["--size", "2TB"], "2.0 TB is larger than the 1.6 TB of DRAM that a node of the profile"),
        (["--requests", "100000000"], "--requests 100000000 is more than 50000000"),
        (["--html", "/tmp"], "cannot write /tmp: it is a directory"),
        (["--size", "0"], "--size 0 is less than a byte"),
        (["--size", "large"], "--size large is no size such as 512MiB"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    tmp_path: Path, arguments: list[str], reason: str
) -> None:
    path = tmp_path / "day.csv"
    path.write_text(f"{HEADING}\no,a,f,http,1\n")
    arguments = [argument.format(trace=path) for argument in arguments]
    with pytest.raises(InputError, match=reason):
        CliRunner().invoke(app, ["simulate", *arguments], catch_exceptions=False)
