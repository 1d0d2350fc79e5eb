"""`fsck`: checks and repairs the checkpoints on disk, while no server uses them."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.options import AsJson, settings_for
from flashserve.errors import CatalogueError, InputError

if TYPE_CHECKING:
    from flashserve.store.disk.fsck import FsckReport, Problem


def fsck(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Whose checkpoints; else the setting's.", show_default=False),
    ] = None,
    no_repair: Annotated[
        bool, typer.Option("--no-repair", help="Fetch nothing; put damaged checkpoints aside.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Verify every byte of the checkpoints that were fetched to disk, and repair what is damaged.

    The server must be stopped. Damaged bytes are fetched again from their source; a checkpoint that
    stays damaged is put aside, never served, and makes this command fail.
    """
    settings = settings_for(data_dir)
    root = settings.data_dir / "store"
    if not root.is_dir():
        raise InputError(f"{root} does not exist: nothing was fetched to disk there")

    from flashserve.store.disk.fsck import fsck as check
    from flashserve.store.disk.tier import DiskTier
    from flashserve.store.refetching import Refetcher

    tier = DiskTier(root, settings.store.disk_bytes)
    try:
        with (
            Refetcher(settings.data_dir, settings.store) as refetch,
            console.progressing(f"checking {root}") as progress,
        ):
            report = check(tier, None if no_repair else refetch, progress)
            if num_stale := _sweep(settings.data_dir):
                stale = f"small files of {num_stale} checkpoints, neither deployed nor on disk"
                report = dataclasses.replace(report, removed=(*report.removed, stale))
    finally:
        tier.close()
    if as_json:
        console.print_json(as_object(report))
    else:
        for line in lines(report):
            console.print_line(line)
    if not report.is_clean:
        raise typer.Exit(1)


def lines(report: FsckReport) -> list[str]:
    """What a person reads: a line for each problem, and a summary."""
    read = f"{report.num_files} files, {console.human_bytes(report.num_bytes)}"
    num_repaired = sum(problem.is_repaired for problem in report.problems)
    summary = (
        f"{report.num_checkpoints} checkpoints checked ({read}): {len(report.problems)} problems, "
        f"{num_repaired} repaired, {len(report.set_aside)} checkpoints put aside"
    )
    told = [_problem_line(problem) for problem in report.problems]
    told += [f"removed, as nothing needs it: {name}" for name in report.removed]
    if report.num_resumable:
        size = console.human_bytes(report.resumable_bytes)
        told.append(f"{report.num_resumable} interrupted fetches can go on ({size})")
    return [*told, summary]


def as_object(report: FsckReport) -> dict[str, Any]:
    """The report for scripts."""
    problems = [
        dataclasses.asdict(problem) | {"path": str(problem.path)} for problem in report.problems
    ]
    return dataclasses.asdict(report) | {"problems": problems, "is_clean": report.is_clean}


def _sweep(data_dir: Path) -> int:
    """How many directories of small files have gone; 0 where nobody knows what is deployed."""
    from flashserve.live.catalogue import FILE_NAME, Catalogue
    from flashserve.store.smallfiles import sweep

    async def deployed() -> list[Path]:
        catalogue = Catalogue(data_dir)
        try:
            await catalogue.open()
            return [model.directory for model in await catalogue.models()]
        finally:
            await catalogue.close()

    try:
        in_use = asyncio.run(deployed()) if (data_dir / FILE_NAME).exists() else []
    except CatalogueError as error:
        sys.stderr.write(f"small files are left alone: {error.message}\n")
        return 0
    return sweep(data_dir, in_use)


def _problem_line(problem: Problem) -> str:
    state = "repaired" if problem.is_repaired else "damaged"
    if not problem.uri:
        return f"{state}: {problem.what}"
    spans = ", ".join(f"{begin}-{end}" for begin, end in problem.ranges)
    where = f"bytes {spans} of {problem.path}" if spans else str(problem.path)
    return f"{state}: {where} (from {problem.uri}): {problem.what}"
