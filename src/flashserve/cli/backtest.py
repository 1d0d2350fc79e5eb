"""`backtest`: which forecaster would have warmed the models of a trace best."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.options import AsJson, check_page
from flashserve.errors import InputError

if TYPE_CHECKING:
    from flashserve.forecast.summary import Summary


def backtest(
    trace: Annotated[
        Path, typer.Option(help="A published trace: CSV, JSON lines or parquet.", metavar="FILE")
    ],
    models: Annotated[
        str, typer.Option(help="Forecasters to try, with commas between.", show_default=False)
    ] = "",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with drawings there.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Try forecasters on a trace: fitted on its past, judged on what came."""
    from flashserve.forecast import registry, report, summary
    from flashserve.forecast.traces import read_trace

    names = [name.strip() for name in models.split(",") if name.strip()]
    registry.make_models(names, seed)  # a wrong name is said before the reading
    if html is not None:
        check_page(html)
    with console.counting("backtest") as progress:
        progress("reading", 0, 1)
        ran = summary.run(read_trace(trace, seed), names or registry.DEFAULT_MODELS, seed, progress)
    if html is not None:
        try:
            html.write_text(report.page(ran))
        except OSError as error:
            raise InputError(f"cannot write {html}: {error.strerror}") from None
    if as_json:
        console.print_json(_without_nan(dataclasses.asdict(ran.summary)))
        return
    _print(ran.summary, html)


def _without_nan(value: Any) -> Any:
    """JSON knows no NaN: a figure that there is not is null."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


_DECISIONS_MEAN = (
    "idle_ratio: to the idle time of the fixed keep-alive that is cold as often, - if none is",
    "cost_N: where a cold start costs N idle minutes, to a keep-alive of N minutes",
    "",
)


def _print(found: Summary, html: Path | None) -> None:
    from flashserve.forecast import report

    cohorts = ", ".join(f"{name} {count}" for name, count in found.cohorts.items())
    console.print_line(f"{found.trace}:")
    console.print_line(
        f"  fitted on {found.num_fitted} series and {found.fitted_minutes} minutes, reported on"
    )
    console.print_line(
        f"  {found.num_reported} series ({cohorts}), the {found.reported_minutes} minutes after"
    )
    rows = report.decision_rows(found.rows)
    console.print_table(
        report.DECISION_COLUMNS, rows, right=report.DECISION_COLUMNS[1:], fold=["model"]
    )
    for line in _DECISIONS_MEAN:
        console.print_line(line)
    rows = report.loss_rows(found.rows)
    console.print_table(report.LOSS_COLUMNS, rows, right=report.LOSS_COLUMNS[2:], fold=["model"])
    console.print_line("loss_N: log loss of an arrival within N minutes, lower is better")
    console.print_line("")
    for line in textwrap.wrap(report.in_short(found.rows), 78):
        console.print_line(line)
    if html is not None:
        console.print_line(f"drawings are in {html}")
