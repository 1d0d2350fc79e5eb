"""`calibrate`: what this machine's tiers give, for the server's predictions to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flashserve.cli import console
from flashserve.cli.options import AsJson, make_data_dir, parse_size, settings_for
from flashserve.errors import InputError
from flashserve.types import Tier

if TYPE_CHECKING:
    from flashserve.store.calibration import Calibration

_MEANINGS = {
    "remote_bytes_per_s": "fetching from the source that was named",
    "disk_bytes_per_s": "reading cold files into memory",
    "page_cache_bytes_per_s": "reading files that the kernel has in memory",
    "dram_bytes_per_s": "a worker's way to bytes in shared memory",
    "copy_bytes_per_s": "copying between two places in memory, one thread",
    "fault_bytes_per_s": "taking fresh shared memory from the kernel",
    "checksum_bytes_per_s": "checking bytes, one thread",
}


def calibrate(
    source: Annotated[
        str | None,
        typer.Option(
            help="Also measure fetching from here, such as s3://bucket/model.", show_default=False
        ),
    ] = None,
    size: Annotated[str, typer.Option(help="Bytes that each round moves.")] = "512MiB",
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Whose disk is measured; else the setting.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure this machine's tiers. The next `serve` predicts start times from the result.

    Takes some seconds; on a busy machine the figures are too low.
    """
    import msgspec

    from flashserve.store.calibration import calibrate_tiers, write_calibration
    from flashserve.store.checkpoint.listing import CHUNK_BYTES
    from flashserve.store.sources.source import open_source

    settings = settings_for(data_dir)
    num_bytes = parse_size(size)
    if num_bytes < CHUNK_BYTES:
        least = console.human_bytes(CHUNK_BYTES)
        raise InputError(f"--size {size} is too little to measure with: {least} at least")
    make_data_dir(settings.data_dir)
    remote = None
    if source is not None:
        remote = open_source(source, settings.data_dir, settings.store)
        if remote.lowest_tier is not Tier.REMOTE:
            raise InputError(f"--source {source} is on this machine: name an s3:// or hf:// source")
        remote.listing()  # what cannot be reached is said before the measuring
    with console.steps("measuring") as step:
        measured = calibrate_tiers(settings.data_dir, num_bytes, settings.store, remote, step)
    path = write_calibration(settings.data_dir, measured)
    if as_json:
        console.print_json(msgspec.to_builtins(measured))
        return
    console.print_table(["what", "GB/s", "of"], _rows(measured), right=["GB/s"], fold=["of"])
    console.print_text(
        f"workers of one core each, on all cores, compute as much together as "
        f"{measured.compute_at_once:.2g} of them alone"
    )
    console.print_line(f"kept in {path}")


def _rows(measured: Calibration) -> list[list[str]]:
    rows = []
    for name, meaning in _MEANINGS.items():
        rate = getattr(measured, name)
        if rate is not None:
            rows.append([name.removesuffix("_bytes_per_s"), f"{rate / 1e9:.2f}", meaning])
    return rows
