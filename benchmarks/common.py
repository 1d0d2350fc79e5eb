"""What every benchmark prints and writes: machine, commit, medians with spread, one JSON shape."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def machine() -> str:
    """Processor, cores, memory and system, without naming the machine."""
    model = platform.machine()
    for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{model}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def commit() -> str:
    """The commit that is measured, marked when the tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@dataclasses.dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one measurement: median, and the middle half of them."""

    median: float
    low: float
    high: float
    num_repeats: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Low and high are the quartiles; with fewer than four samples, the extremes."""
        ordered = sorted(samples)
        low, high = ordered[0], ordered[-1]
        if len(ordered) >= 4:
            low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
        return cls(statistics.median(ordered), low, high, len(ordered))

    def __str__(self) -> str:
        return f"{self.median:.4g} [{self.low:.4g} .. {self.high:.4g}]"


def value(number: float, unit: str, *, better: str, aim: float | None = None) -> dict[str, Any]:
    """One entry of a report's `values`. better: "lower" or "higher"."""
    assert better in {"lower", "higher"}
    met = None if aim is None else (number <= aim if better == "lower" else number >= aim)
    return {"value": number, "unit": unit, "better": better, "aim": aim, "met": met}


def percentile(samples: Iterable[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the samples do not exceed."""
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def parse_arguments(description: str) -> argparse.Namespace:
    """--quick and --json FILE, which every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repeats, small sizes: a hint")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the report here")
    return parser.parse_args()


def write_report(
    path: pathlib.Path | None,
    bench: str,
    *,
    seed: int,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    values: Mapping[str, Mapping[str, Any]],
) -> None:
    """Prints where the numbers come from and writes the report as JSON, if a path is given.

    Args:
        ratios: above 1 where FlashServe is better.
        values: everything else, each made by `value`.
    """
    report = {
        "bench": bench,
        "machine": machine(),
        "commit": commit(),
        "seed": seed,
        "rows": list(rows),
        "ratios": dict(ratios),
        "values": dict(values),
    }
    print(f"\nmachine: {report['machine']}; commit: {report['commit']}; seed: {seed}")
    for name, ratio in ratios.items():
        print(f"  {name} = {ratio:.3g}")
    for name, entry in values.items():
        verdict = {True: "met", False: "missed", None: "no aim"}[entry["met"]]
        aim = "" if entry["aim"] is None else f" (aim {entry['aim']:g}, {verdict})"
        print(f"  {name} = {entry['value']:.4g} {entry['unit']}{aim}")
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys, aligned; the keys are the heading."""
    heading = list(rows[0])
    cells = [heading] + [[str(row[name]) for name in heading] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
