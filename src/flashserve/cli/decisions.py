"""`decisions`: what the controller has ordered lately, and why."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import connect
from flashserve.cli.options import AsJson, Url
from flashserve.errors import InputError

_KEPT = 1000
"""As many as the server remembers at most."""


def decisions(
    name: Annotated[
        str | None,
        typer.Argument(metavar="NAME", help="Those about one model alone.", show_default=False),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=_KEPT, help="The latest so many.")] = 20,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Show the latest starts, stops, stagings and refusals, each with its reason.

    The newest comes last.
    """
    with connect(url) as client:
        found = client.decisions(limit if name is None else _KEPT)
        shown = [each for each in found if name is None or each["model_id"] == name][:limit]
        if name is not None and not shown:
            _check_deployed(name, [model["name"] for model in client.models()])
    if as_json:
        console.print_json(shown)
    elif shown:
        _print(shown[::-1])
    else:
        of = "" if name is None else f" of {name}"
        console.print_line(f"nothing has been decided{of} since the server started")


def _check_deployed(name: str, deployed: Sequence[str]) -> None:
    if name not in deployed:
        raise InputError(
            f"nothing has been decided of {name} since the server started, and no model of that "
            f"name is deployed; deployed: {', '.join(deployed) or 'none'}"
        )


def _print(decisions: Sequence[Mapping[str, Any]]) -> None:
    times = [datetime.datetime.fromtimestamp(each["at"]).astimezone() for each in decisions]
    days = {time.date() for time in times} | {datetime.datetime.now().astimezone().date()}
    shape = "%H:%M:%S" if len(days) == 1 else "%m-%d %H:%M:%S"
    nodes = {each["node_id"] for each in decisions if each["node_id"]}
    columns = ["time", "action", "model", *(["node"] if len(nodes) > 1 else []), "reason"]
    rows = []
    for time, each in zip(times, decisions, strict=True):
        action = each["action"].removesuffix("Replica").lower()
        cells = {"time": time.strftime(shape), "action": action, "model": each["model_id"] or "-"}
        cells |= {"node": each["node_id"] or "-", "reason": each["reason"]}
        rows.append([cells[column] for column in columns])
    console.print_table(columns, rows, fold=["model", "reason"])
