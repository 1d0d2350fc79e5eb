"""`deploy`, `delete`, `ps`, `stage` and `evict`: the models of a running server."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import connect
from flashserve.cli.options import AsJson, Name, Url, absolute_source
from flashserve.cli.tiers import print_tiers, progress_of
from flashserve.errors import InputError

_COLUMNS: dict[str, Callable[[Any], str]] = {
    "name": str,
    "state": str,
    "tier": str,
    "replicas": str,
    "in_flight": str,
    "dram_bytes": console.human_bytes,
    "disk_bytes": console.human_bytes,
    "leases": str,
    "last_used_s": console.human_age,
    "reason": console.beginning,
}
"""Of `ps`: what a model's object says, and how it is shown."""
_WHERE = {"remote": "at its remote source", "dram": "in DRAM"}
"""Of a model's bytes, where "on" a tier would not read well."""
_STATE_STYLES = {"ready": "green", "loading": "yellow", "draining": "yellow", "failed": "red"}


class StagedTier(enum.StrEnum):
    """Tiers that a model can be brought to, or made to leave, by hand."""

    DISK = "disk"
    DRAM = "dram"


def deploy(
    name: Name,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A directory with a safetensors checkpoint, s3://bucket/prefix, hf://org/name, or "
            "demo:smollm2.",
            show_default=False,
        ),
    ],
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds without a request after which it stops; else the policy decides.",
            show_default=False,
        ),
    ] = None,
    min_replicas: Annotated[
        int | None,
        typer.Option(
            min=0, help="Replicas that are kept ready whatever comes.", show_default=False
        ),
    ] = None,
    max_replicas: Annotated[
        int | None,
        typer.Option(min=1, help="Replicas at most; else the server's.", show_default=False),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests at once that one replica is meant to serve.", show_default=False
        ),
    ] = None,
    schedule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINE",
            help="Bounds for some hours, such as 'mon-fri 08:00-18:00 min=1'; may be repeated.",
            show_default=False,
        ),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Take the name over from a model that has it.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Make a model available under NAME. It stays so until it is deleted.

    The checkpoint is checked at once and loaded at the first request.
    """
    if keep_alive is not None and not math.isfinite(keep_alive):
        raise InputError(f"--keep-alive {keep_alive} is no number of seconds")
    given = {
        "keep_alive_s": keep_alive,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "target": target,
        "schedule": schedule or None,
    }
    options: dict[str, Any] = {"replace": replace}
    options |= {name: value for name, value in given.items() if value is not None}
    with connect(url) as client, console.waiting(f"deploying {name} from {source}"):
        model = client.deploy(name, absolute_source(source), options)
    _print_model(model, as_json=as_json)


def delete(name: Name, url: Url = None, as_json: AsJson = False) -> None:
    """Stop a model and forget it. Its checkpoint stays where it is."""
    with connect(url) as client:
        client.delete(name)
    if as_json:
        console.print_json({"name": name, "deleted": True})
    else:
        console.print_line(f"{name} is deleted")


def ps(
    tiers: Annotated[
        bool, typer.Option("--tiers", help="Show what the tiers hold, fetch and check instead.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """List the deployed models, where their bytes are, and why.

    A terminal gets the beginning of a long reason; `flashserve decisions NAME` has all of it.
    """
    with connect(url) as client:
        if tiers:
            print_tiers(client.tiers(), as_json=as_json)
            return
        models = client.models()
    if as_json:
        console.print_json(models)
        return
    if not models:
        console.print_line("no models are deployed: try `flashserve deploy smollm2 demo:smollm2`")
        return
    columns = list(_COLUMNS)
    if not any(model["disk_bytes"] for model in models):
        columns.remove("disk_bytes")  # the disk tier holds nothing: there is no remote source
    console.print_table(
        columns,
        [[_COLUMNS[column](model[column]) for column in columns] for model in models],
        right=["replicas", "in_flight", "dram_bytes", "disk_bytes", "leases", "last_used_s"],
        fold=["name", "reason"],
        spare=["leases", "disk_bytes"],
        styles=_STATE_STYLES,
    )


def stage(
    name: Name,
    tier: Annotated[StagedTier, typer.Option(help="Where its bytes shall be.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Bring a model's bytes up to a tier, ahead of its first request."""
    with (
        connect(url) as client,
        connect(url) as watcher,
        console.following(
            f"staging {name} to {tier.value}", lambda: progress_of(watcher.tiers(), name)
        ),
    ):
        model = client.stage(name, tier.value)
    _print_model(model, as_json=as_json)


def evict(
    name: Name,
    tier: Annotated[StagedTier, typer.Option(help="Which tier to leave, with all above it.")],
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Free the bytes that a model takes in a tier. The next request brings them back."""
    with connect(url) as client, console.waiting(f"evicting {name} from {tier.value}"):
        model = client.evict(name, tier.value)
    _print_model(model, as_json=as_json)


def _print_model(model: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.print_json(model)
        return
    size = console.human_bytes(model["size_bytes"])
    where = _WHERE.get(model["tier"], f"on {model['tier']}")
    console.print_line(f"{model['name']} is {model['state']}, its {size} {where}")
