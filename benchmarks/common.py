"""What every benchmark prints and writes: machine, commit, medians with spread, one JSON shape."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
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


def median(samples: Iterable[float]) -> float:
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of one measurement's repeats; with under four, their extremes."""
    ordered = sorted(samples)
    low, high = ordered[0], ordered[-1]
    if len(ordered) >= 4:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return {"median": median(ordered), "low": low, "high": high, "repeats": len(ordered)}


def percentile(samples: Iterable[float], percent: float) -> float:
    """The smallest sample that at least `percent` % of the samples do not exceed."""
    ordered = sorted(samples)
    rank = max(1, -(-len(ordered) * percent // 100))
    return ordered[int(rank) - 1]


def value(number: float, unit: str, *, better: str, aim: float | None = None) -> dict[str, Any]:
    """One entry of a report's `values`. better: "lower" or "higher"."""
    assert better in {"lower", "higher"}
    met = None if aim is None else (number <= aim if better == "lower" else number >= aim)
    return {"value": number, "unit": unit, "better": better, "aim": aim, "met": met}


@contextlib.contextmanager
def demo_model() -> Iterator[pathlib.Path]:
    """The real small model's directory, converted once per clone."""
    path = _ROOT / ".demo" / "models" / "smollm2"
    subprocess.run([sys.executable, "-m", "flashserve.store.sources.demo", str(path)], check=True)
    yield path


def write_report(
    bench: str,
    *,
    seed: int,
    rows: Sequence[Mapping[str, Any]],
    ratios: Mapping[str, float],
    values: Mapping[str, Mapping[str, Any]],
    aims: Mapping[str, float] | None = None,
    notes: str | None = None,
    json_file: str | pathlib.Path | None = None,
) -> None:
    """Prints what was measured and where, and writes it as JSON if a file is named.

    Args:
        rows: one measurement each; all have the same keys.
        ratios: above 1 where FlashServe is better.
        values: everything else, each made as by `value`.
        aims: the least that each of the ratios should be.
        notes: what the clock covers and what was cached.
    """
    report = {
        "bench": bench,
        "machine": machine(),
        "commit": commit(),
        "seed": seed,
        "rows": [dict(row) for row in rows],
        "ratios": dict(ratios),
        "values": dict(values),
    }
    if notes:
        print(notes.strip() + "\n")
    print_table(rows)
    print(f"\nmachine: {report['machine']}; commit: {report['commit']}; seed: {seed}")
    for name, ratio in ratios.items():
        aim = (aims or {}).get(name)
        print(f"  {name} = {ratio:.3g}" + _verdict(aim, aim is not None and ratio >= aim))
    for name, entry in values.items():
        verdict = _verdict(entry["aim"], bool(entry["met"]))
        print(f"  {name} = {entry['value']:.4g} {entry['unit']}{verdict}")
    if json_file is not None:
        pathlib.Path(json_file).write_text(json.dumps(report, indent=2) + "\n")


def _verdict(aim: float | None, met: bool) -> str:
    return "" if aim is None else f" (aim {aim:.3g}, {'met' if met else 'missed'})"


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of equal keys, aligned; the keys are the heading."""
    heading = list(rows[0])
    cells = [heading] + [[_cell(row[name]) for name in heading] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heading))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def _cell(content: object) -> str:
    if content is None:
        return "-"
    return f"{content:.4g}" if isinstance(content, float) else str(content)
