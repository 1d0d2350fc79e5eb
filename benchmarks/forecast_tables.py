"""The tables of docs/explanation/forecasting.md from a report: `forecast_tables.py REPORT.json`.

Prints Markdown: of each figure the median over the seeds, and in brackets the worst of their
unfavourable bounds. `parts` of the report, where it has them, say which commit each part is of.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

COSTS = ("cost_5", "cost_10", "cost_30", "cost_60")
DECISIONS = ("idle_at_5pct_cold", "idle_at_10pct_cold", *COSTS)
LEADS = (1, 5, 10, 30)
LOSSES = tuple(f"logloss_ratio_{lead}" for lead in LEADS)
NAMES = {"azure": "Azure functions", "servegen": "ServeGen clients", "gentd26": "GenTD26 models"}
_PAPER = "prophet-lstm"

Rows = Sequence[dict[str, Any]]


class Figures:
    """Rows of a report by trace, model, cohort and figure."""

    def __init__(self, rows: Rows) -> None:
        self._found: dict[tuple[str, str, str, str], Rows] = {}
        found = collections.defaultdict(list)
        for row in rows:
            if "figure" in row:
                found[row["trace"], row["model"], row["cohort"], row["figure"]].append(row)
        self._found = dict(found)

    def keys(self, wanted: Callable[[str, str, str], bool]) -> list[tuple[str, str, str]]:
        """(trace, model, cohort), in the report's order."""
        every = dict.fromkeys(key[:3] for key in self._found)
        return [key for key in every if wanted(*key)]

    def num_series(self, trace: str, model: str, cohort: str) -> int:
        rows = next(rows for key, rows in self._found.items() if key[:3] == (trace, model, cohort))
        return int(rows[0]["num_series"])

    def has(self, trace: str, model: str, cohort: str, figure: str) -> bool:
        return (trace, model, cohort, figure) in self._found

    def said(self, trace: str, model: str, cohort: str, figure: str, *, bound: bool = True) -> str:
        rows = self._found.get((trace, model, cohort, figure), ())
        values = [row["value"] for row in rows if row["value"] is not None]
        if not values:
            return "-"
        highs = [math.inf if row["high"] is None else row["high"] for row in rows]
        middle = _number(statistics.median(values))
        return f"{middle} ({_number(max(highs))})" if bound else middle


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(row) + " |"
    yield ""


def decisions(figures: Figures) -> Iterator[str]:
    for trace, title in NAMES.items():
        keys = figures.keys(lambda t, _, cohort, wanted=trace: (t, cohort) == (wanted, "all"))
        keys = [key for key in keys if figures.has(*key, COSTS[0])]
        if not keys:
            continue
        yield from (f"**{title}**", "")
        yield from table(
            ["forecaster", "idle at 5 %", "idle at 10 %", *(c.replace("_", " ") for c in COSTS)],
            ([f"`{key[1]}`", *(figures.said(*key, name) for name in DECISIONS)] for key in keys),
        )


def cohorts(figures: Figures, candidate: str) -> Iterator[str]:
    keys = figures.keys(lambda trace, model, _: trace in NAMES and model == candidate)
    yield from table(
        ["cohort", *(f"{lead} min" for lead in LEADS), *(c.replace("_", " ") for c in COSTS)],
        (
            [
                f"{NAMES[key[0]]}, {key[2]} ({figures.num_series(*key)})",
                *(figures.said(*key, name) for name in (*LOSSES, *COSTS)),
            ]
            for key in keys
            if figures.has(*key, COSTS[0])
        ),
    )


def counts(figures: Figures, candidate: str) -> Iterator[str]:
    keys = figures.keys(lambda _, model, cohort: (model, cohort) == (candidate, "busy"))
    leads = (1, 5, 30)
    names = [f"pinball_{level}_{lead}" for level in (90, 99) for lead in leads]
    yield from table(
        [
            "trace",
            *(f"0.{level}: {lead} min" for level in (9, 99) for lead in leads),
            "covered 0.9",
            "covered 0.99",
        ],
        (
            [
                key[0] if "(" in key[0] else f"{key[0]} ({figures.num_series(*key)})",
                *(figures.said(*key, name) for name in names),
                *(figures.said(*key, f"coverage_{level}_5", bound=False) for level in (90, 99)),
            ]
            for key in keys
            if "(" not in key[0]
        ),
    )


def paper(figures: Figures) -> Iterator[str]:
    """Both hybrids on the same few series: what comes and goes, then what is always busy."""
    keys = figures.keys(lambda trace, _, cohort: "(" in trace and cohort == "all")
    if keys:
        yield from table(
            ["series that come and go", "forecaster", *(f"log loss, {lead} min" for lead in LEADS)]
            + [name.replace("_", " ") for name in COSTS],
            (
                [
                    key[0],
                    f"`{key[1]}`",
                    *(figures.said(*key, n) for n in (*(_losses_of(key[1])), *COSTS)),
                ]
                for key in keys
            ),
        )
    keys = figures.keys(lambda trace, _, cohort: "(" in trace and cohort == "busy")
    if keys:
        names = [f"mae_{lead}" for lead in LEADS]
        names += [f"pinball_90_{lead}" for lead in LEADS]
        yield from table(
            ["busy series", "forecaster", *(f"median off, {lead} min" for lead in LEADS)]
            + [f"0.9 quantile, {lead} min" for lead in LEADS],
            (
                [key[0], f"`{key[1]}`", *(figures.said(*key, name) for name in names)]
                for key in keys
            ),
        )


def _losses_of(model: str) -> Sequence[str]:
    return [f"logloss_{lead}" for lead in LEADS] if f"/{_PAPER}" in model else LOSSES


def seasons(figures: Figures) -> Iterator[str]:
    model = "decomposition/prophet"
    keys = figures.keys(lambda _, name, __: name == model)
    yield from table(
        ["trace (series)", "error over Prophet's", "median over series"],
        (
            [
                f"{key[0]} ({figures.num_series(*key)})",
                figures.said(*key, "mae_day"),
                figures.said(*key, "median_mae_day", bound=False),
            ]
            for key in keys
        ),
    )


def values(report: dict[str, Any]) -> Iterator[str]:
    yield from table(
        ["key", "value", "aim", "met"],
        (
            [f"`{key}`", _short(each["value"]), _short(each["aim"]), "yes" if each["met"] else "no"]
            for key, each in report["values"].items()
        ),
    )


def _short(number: float | None) -> str:
    return "-" if number is None else f"{number:.3g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("report", type=pathlib.Path)
    parser.add_argument("--candidate", help="whose cohorts to show; else the report's")
    args = parser.parse_args()
    report = json.loads(args.report.read_text())
    figures = Figures(report["rows"])
    candidate = args.candidate or report.get("candidate", "auto")
    for line in (
        *decisions(figures),
        *cohorts(figures, candidate),
        *counts(figures, candidate),
        *paper(figures),
        *seasons(figures),
        *values(report),
    ):
        print(line)


if __name__ == "__main__":
    main()
