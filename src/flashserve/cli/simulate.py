"""`simulate`: what a policy would have cost on a trace, and how long requests would have waited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashserve.cli import console
from flashserve.cli.options import AsJson, check_page, parse_size
from flashserve.errors import InputError

if TYPE_CHECKING:
    from flashserve.sim.figures import Figures
    from flashserve.sim.results import Results
    from flashserve.sim.scenario import Scenario

_COLUMNS = ["policy", "cold", "p50_s", "p95_s", "p99_s", "under_1s", "idle_h", "cost"]
_LEGEND = (
    "cold: share of requests that waited for a start; p50_s to p99_s: seconds to the first "
    "token; under_1s: share of all requests; idle_h: hours of workers without a request; "
    "cost: of workers, DRAM and disk, in all"
)


def simulate(
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A published trace: CSV, JSON lines or parquet. Without one, synthetic functions.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="Policies, with commas between.", show_default=False)
    ] = "",
    nodes: Annotated[int, typer.Option(help="How many nodes of the profile.", min=1)] = 1,
    profile: Annotated[
        str, typer.Option(help="A named node, or a data directory with a calibration.")
    ] = "8xh100",
    models: Annotated[int, typer.Option(help="Models, drawn from the trace's series.", min=1)] = 16,
    size: Annotated[
        str | None,
        typer.Option(
            help="Of each model, such as 14GB; else that of the model which the profile measured.",
            show_default=False,
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(help="Thin busy models to about so many in all.", min=1, show_default=False),
    ] = None,
    hours: Annotated[
        float | None, typer.Option(help="Stop after so many.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", min=0)] = 0,
    fit_trace: Annotated[
        Path | None,
        typer.Option(
            help="Fit the forecaster on this trace, and not on a part of the other.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    forecaster: Annotated[
        str,
        typer.Option(help="As of `backtest`; `auto`, as on a server, takes minutes to fit."),
    ] = "hazard",
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a page with drawings and reasons there.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Replay a trace of many models under each policy, in minutes instead of days.

    The policies are those that `serve` runs; nodes and engines are modelled.
    """
    from flashserve.sim import report, scenario, trial

    names = [name.strip() for name in policy.split(",") if name.strip()] or list(trial.POLICIES)
    trial.check_names(names)  # what is wrong is said before the reading
    if html is not None:
        check_page(html)
    wanted = scenario.Wanted(
        trace,
        fit_trace,
        profile,
        nodes,
        models,
        requests,
        hours,
        seed,
        forecaster,
        None if size is None else parse_size(size),
    )
    with console.counting("simulate") as progress:
        made = scenario.make(wanted, names, progress)
        ran = list(_run(made, names, progress))
    if html is not None:
        try:
            html.write_text(report.page(ran, made.about, made.trial.prices))
        except OSError as error:
            raise InputError(f"cannot write {html}: {error.strerror}") from None
    found = [figures for _, figures in ran]
    if as_json:
        about = dataclasses.asdict(made.about)
        rows = [dataclasses.asdict(figures) for figures in found]
        prices = dataclasses.asdict(made.trial.prices)
        console.print_json({**about, "seed": seed, "prices": prices, "policies": rows})
        return
    _print(made, found, html)


def _run(
    made: Scenario, names: list[str], progress: Callable[[str, int, int], None]
) -> list[tuple[Results, Figures]]:
    from flashserve.sim import figures, trial

    ran = []
    for name in names:
        results = made.trial.run(name, progress=trial.label_progress(progress, name))
        ran.append((results, figures.figures(results, made.trial.prices)))
    return ran


def _print(made: Scenario, found: list[Figures], html: Path | None) -> None:
    from flashserve.sim import report

    console.print_text(f"{made.about.workload}: {made.about.text}")
    console.print_text(f"prices: {report.priced(made.trial.prices)}")
    shown = [report.COLUMNS.index(name) for name in _COLUMNS]
    rows = [[row[index] for index in shown] for row in report.rows(found)]
    console.print_table(_COLUMNS, rows, right=_COLUMNS[1:])
    for each in found:
        if rejected := each.answers.rejected:
            console.print_line(f"{each.policy} rejected {rejected} of {each.answers.requests}")
    console.print_text(_LEGEND)
    if html is not None:
        console.print_line(f"drawings and reasons are in {html}")
