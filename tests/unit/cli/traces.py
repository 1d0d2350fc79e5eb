"""A trace as its publisher writes it, for tests of commands that read one."""

from __future__ import annotations

from pathlib import Path

from flashserve.forecast import synthetic

HEADING = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(map(str, range(1, 1441)))


def day_of_functions(path: Path) -> Path:
    """A day as Azure publishes it."""
    made = synthetic.functions(24, 1440, seed=5)
    lines = [HEADING]
    for number, row in enumerate(made.trace.history.counts.astype(int)):
        lines.append(",".join(["o", "a", f"f{number}", "http", *map(str, row)]))
    path.write_text("\n".join(lines) + "\n")
    return path
