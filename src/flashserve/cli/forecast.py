"""`forecast`: what the server expects to be asked for, and why."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import connect
from flashserve.cli.options import AsJson, Url

_BARS = " ▁▂▃▄▅▆▇█"
_SHOWN_MINUTES = (1, 5, 30)
_BAR_WIDTH = 30
_MAX_LEVEL = "0.9"

Name = Annotated[
    str | None,
    typer.Argument(
        metavar="NAME",
        help="A model, an adapter or MODEL:ADAPTER; all without.",
        show_default=False,
    ),
]


def forecast(name: Name = None, url: Url = None, as_json: AsJson = False) -> None:
    """Show what is expected of each model and adapter, or of one, and why.

    That is the chance of a request within each lead time, and how many to expect.
    """
    with connect(url) as client:
        found = client.forecasts() if name is None else client.forecast(name)
    if as_json:
        console.print_json(found)
    elif name is not None:
        for line in _lines(found):
            console.print_line(line)
    else:
        _print_all(found["status"], found["data"])


def _print_all(status: Mapping[str, Any], forecasts: Sequence[Mapping[str, Any]]) -> None:
    if forecasts:
        columns = ["name", *(f"P_{minutes}min" for minutes in _SHOWN_MINUTES), "by_lead", "in_1h"]
        console.print_table(
            [*columns, "model", "why"],
            [_row(each) for each in forecasts],
            right=[*columns[1:4], "in_1h"],
            fold=["name", "why"],
            spare=["P_5min"],
        )
    console.print_line(_status_line(status))


def _row(forecast: Mapping[str, Any]) -> list[str]:
    leads = {lead["lead_s"] / 60: lead for lead in forecast["leads"]}
    chances = [_percent(leads[minutes]["p_arrival"]) for minutes in _SHOWN_MINUTES]
    return [
        forecast["name"],
        *chances,
        sparkline([lead["p_arrival"] for lead in forecast["leads"]]),
        _count(forecast["leads"][-1]["mean"]),
        forecast["model"],
        forecast["why"],
    ]


def _lines(forecast: Mapping[str, Any]) -> Iterator[str]:
    made_at = datetime.datetime.fromtimestamp(forecast["made_at"], tz=datetime.UTC)
    yield f"{forecast['name']} from {made_at:%Y-%m-%d %H:%M} UTC on"
    yield f"by {forecast['model']}: {forecast['why']}"
    yield ""
    yield f"{'within':>8}  {'P(request)':>10}  {'':{_BAR_WIDTH}}  {'mean':>8}  {'90 % below':>10}"
    for lead in forecast["leads"]:
        p = lead["p_arrival"]
        bar = "█" * round(p * _BAR_WIDTH)
        within = console.human_age(lead["lead_s"])
        mean, upper = _count(lead["mean"]), _count(lead["quantiles"][_MAX_LEVEL])
        yield f"{within:>8}  {_percent(p):>10}  {bar:{_BAR_WIDTH}}  {mean:>8}  {upper:>10}"
    if forecast["components"]:
        yield ""
        yield "made of (requests per minute; hazard: chance of one in the next minute)"
        for part, value in forecast["components"].items():
            yield f"  {part:<9} {_percent(value) if part == 'hazard' else format(value, '.3g')}"


def _status_line(status: Mapping[str, Any]) -> str:
    match status["state"]:
        case "off":
            return "nothing is forecast: forecast.enabled is off"
        case "starting":
            return "the forecaster is starting: nothing is forecast yet"
        case "failed":
            return f"the forecaster failed and will be tried again: {status['reason']}"
    if not status["num_series"]:
        return "nothing is forecast yet: forecasts begin with the minute after the first request"
    number = status["num_series"]
    made_at = datetime.datetime.fromtimestamp(status["made_at"], tz=datetime.UTC)
    return f"{number} forecast from {made_at:%H:%M} UTC on{_training(status['training'])}"


def _training(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "; the network was not trained yet"
    at = datetime.datetime.fromtimestamp(report["at"], tz=datetime.UTC)
    words = {"taken": "used", "no_better": "no better, so not used", "failed": "failed"}
    return f"; last training {at:%Y-%m-%d %H:%M} UTC: {words.get(report['outcome'], '?')}"


def sparkline(chances: Sequence[float]) -> str:
    """One block for each chance; a blank is under one in sixteen."""
    return "".join(_BARS[min(max(round(p * (len(_BARS) - 1)), 0), len(_BARS) - 1)] for p in chances)


def _percent(p: float) -> str:
    """One digit more where that is what tells a small chance from none."""
    if 0 < p < 0.0005:
        return "<0.1 %"
    return f"{p:.1%}".replace("%", " %") if p < 0.1 else f"{p:.0%}".replace("%", " %")


def _count(value: float) -> str:
    if value >= 100 or value == math.floor(value):
        return f"{value:.0f}"
    return f"{value:.2g}"
