"""`savings`: what models and tenants took, and what other policies would have taken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import connect
from flashserve.cli.options import AsJson, Url
from flashserve.policy import text

_COLUMNS = ("requests", "cold", "busy", "loading", "idle", "price")


def savings(
    days: Annotated[int, typer.Option(min=1, max=35, help="Days (UTC), today among them.")] = 7,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show what models, adapters and tenants took of the workers, and at which price.

    Beside it stands what the same traffic would have taken with every model always on, with a
    keep-alive of ten minutes, and under the policy that runs as a shadow.
    """
    with connect(url) as client:
        report = client.savings(days)
    if as_json:
        console.print_json(report)
        return
    prices = report["prices"]
    console.print_line(f"policy {report['policy']}, since {report['since']} (UTC)")
    console.print_line(
        f"prices in {prices['currency']}: a worker ({prices['worker']}) "
        f"{prices['gpu_per_hour']:.4g} an hour"
    )
    _print_lines("model", [*report["models"], report["total"]])
    if report["adapters"]:
        _print_lines("adapter", report["adapters"])
    if len(report["tenants"]) > 1:
        _print_lines("tenant", report["tenants"])
    _print_against(report)


def _print_lines(heading: str, lines: Sequence[dict[str, Any]]) -> None:
    console.print_line("")
    rows = [[line["name"], *_cells(line)] for line in lines]
    console.print_table([heading, *_COLUMNS], rows, right=_COLUMNS, fold=[heading])


def _print_against(report: dict[str, Any]) -> None:
    """Each other policy, and what this one saved against it."""
    columns = [*_COLUMNS, "saved"]
    rows = [
        [other["policy"], *_cells(other["shadow"]), _saved(other)] for other in report["against"]
    ]
    if rows:
        console.print_line("")
        console.print_table(["instead", *columns], rows, right=columns, fold=["instead"])
    for policy, reason in report["broken"].items():
        console.print_line(f"{policy} failed as a shadow and counts no more: {reason}")


def _saved(other: dict[str, Any]) -> str:
    fraction = other["saved_fraction"]
    return "-" if fraction is None else f"{text.money(other['saved'])} ({fraction:.0%})"


def _cells(line: dict[str, Any]) -> list[str]:
    seconds = (_duration(line[key]) for key in ("busy_s", "loading_s", "idle_s"))
    return [str(line["requests"]), str(line["cold"]), *seconds, text.money(line["price"])]


def _duration(seconds: float) -> str:
    """In a unit that leaves two or three digits; `-` for none."""
    for limit, size, unit in ((100.0, 1.0, "s"), (6000.0, 60.0, "min"), (1e12, 3600.0, "h")):
        if abs(seconds) < limit:
            return f"{seconds / size:.1f} {unit}" if seconds else "-"
    return "-"
