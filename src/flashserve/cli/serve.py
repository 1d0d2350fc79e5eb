"""`serve`: the server itself, in the foreground."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashserve.config import load_settings


def serve(
    host: Annotated[
        str | None, typer.Option(help="Address to listen on.", show_default=False)
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port; 0 takes a free one.", show_default=False),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Worker processes; each serves one model.", show_default=False),
    ] = None,
    dram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Host memory that holds checkpoints, such as 8GiB.",
            show_default=False,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where models, state and the socket are.", show_default=False),
    ] = None,
    keep_alive: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Seconds without a request after which a model stops that has no forecast.",
            show_default=False,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Who decides how many replicas there are.", show_default=False
        ),
    ] = None,
    shadow: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Another policy, which only reports what it would have done and saved.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the server until SIGTERM or Ctrl-C, which let running streams finish.

    Options win over FLASHSERVE_ variables, and these over the TOML file: see `flashserve config`.
    """
    given = {
        "data_dir": data_dir,
        "server": {"host": host, "port": port},
        "node": {"num_workers": workers, "dram_bytes": dram},
        "policy": {"keep_alive_s": keep_alive, "name": policy, "shadow": shadow},
    }
    settings = load_settings(**without_nones(given))

    from flashserve.cli.server import run_server

    run_server(settings)


def without_nones(given: dict[str, Any]) -> dict[str, Any]:
    """`given` without what is None, at any depth, and without what that leaves empty."""
    kept: dict[str, Any] = {}
    for name, value in given.items():
        inner = without_nones(value) if isinstance(value, dict) else value
        if inner is not None and inner != {}:
            kept[name] = inner
    return kept
