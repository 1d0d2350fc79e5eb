"""`adapter add`, `list` and `remove`: the LoRA fine-tunes of deployed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import connect
from flashserve.cli.options import AsJson, Url, absolute_source

_COLUMNS: dict[str, Callable[[Any], str]] = {
    "base": str,
    "name": str,
    "version": str,
    "rank": str,
    "tier": str,
    "in_flight": str,
    "requests": str,
    "tokens": str,
    "last_used_s": console.human_age,
    "advice": str,
}
"""Of `adapter list`: what an adapter's object says, and how it is shown."""
_MULTIPLEX = "multiplex"

Base = Annotated[
    str, typer.Argument(metavar="BASE", help="The model it was trained for.", show_default=False)
]
Name = Annotated[
    str, typer.Argument(metavar="NAME", help="The adapter's name.", show_default=False)
]


def add(
    base: Base,
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A directory that PEFT has saved, s3://bucket/prefix or hf://org/name.",
            show_default=False,
        ),
    ],
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name over from another version.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a LoRA adapter available: requests name it NAME or BASE:NAME.

    It is checked against BASE and asked for a token before it counts; a cold BASE starts for that.
    """
    with connect(url) as client, console.waiting(f"adding {name} to {base}"):
        adapter = client.add_adapter(base, name, absolute_source(source), replace=replace)
    if as_json:
        console.print_json(adapter)
        return
    size = console.human_bytes(adapter["size_bytes"])
    console.print_text(
        f"{name} is ready: version {adapter['version']}, rank {adapter['rank']}, {size}, "
        f"on {', '.join(adapter['targets'])} of {base}"
    )


def list_(
    base: Annotated[
        str | None, typer.Argument(metavar="BASE", help="Only this model's.", show_default=False)
    ] = None,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters, their use, and the cheapest way to serve each."""
    with connect(url) as client:
        adapters = client.adapters(base)
    if as_json:
        console.print_json(adapters)
        return
    if not adapters:
        console.print_line("there are no adapters: try `flashserve adapter add BASE NAME SOURCE`")
        return
    console.print_table(
        list(_COLUMNS),
        [[show(each[column]) for column, show in _COLUMNS.items()] for each in adapters],
        right=["version", "rank", "in_flight", "requests", "tokens", "last_used_s"],
        fold=["base", "name"],
        spare=["in_flight", "version", "tokens"],
        styles={_MULTIPLEX: "", "merge": "yellow", "own replica": "yellow"},
    )
    for each in adapters:
        if each["advice"] != _MULTIPLEX:
            console.print_text(f"{each['name']}: {each['advice']}, since {each['reason']}")


def remove(name: Name, url: Url = None, as_json: AsJson = False) -> None:
    """Forget an adapter. Streams under way finish; its files stay where they are."""
    with connect(url) as client:
        client.remove_adapter(name)
    if as_json:
        console.print_json({"name": name, "removed": True})
    else:
        console.print_line(f"{name} is removed")
