"""Traces as their publishers give them: CSV with a heading, or one JSON object per line."""

from __future__ import annotations

import csv
import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from flashserve.errors import InputError
from flashserve.forecast.core import History
from flashserve.forecast.traces import DAY, Trace, check_size, from_events

_MAX_TIME_S = 1e11
_MAX_COUNT = 1e9

Row = dict[str, str]


def read(path: Path) -> Trace:
    """Raises InputError: names the line and what is wrong with it."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            if first.lstrip().startswith("{"):
                return _mooncake(path, file)
            return _csv(path, file)
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is neither text nor parquet (byte {error.start})") from None


def _csv(path: Path, file: Iterator[str]) -> Trace:
    lines = csv.reader(file, strict=True)
    try:
        heading = [cell.strip() for cell in next(lines)]
        if heading[:4] == _AZURE_2019 and heading[4:] == [str(m) for m in range(1, DAY + 1)]:
            return _azure_2019(path, lines)
        for columns, of_row, clients in _EVENTS:
            if set(columns) <= set(heading):
                return _events(path, heading, lines, of_row, clients)
    except StopIteration:
        raise InputError(f"{path} is empty") from None
    except csv.Error as error:
        raise _fault(path, lines.line_num, str(error)) from None
    known = "; ".join(
        [", ".join([*_AZURE_2019, "1 to 1440"])] + [", ".join(c) for c, _, _ in _EVENTS]
    )
    raise _fault(path, 1, f"no known format has these columns; known are: {known}")


def _azure_2019(path: Path, lines: Iterator[list[str]]) -> Trace:
    """One line per function and day: owner, app, function, trigger, 1440 counts."""
    names, rows = [], []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != DAY + 4:
            raise _fault(path, number, f"{len(cells)} fields instead of {DAY + 4}")
        try:
            row = np.array(cells[4:], dtype=np.float64)
        except ValueError as error:
            raise _fault(path, number, str(error)) from None
        if not ((row >= 0) & (row <= _MAX_COUNT) & (row == np.floor(row))).all():
            raise _fault(path, number, "counts are whole numbers from 0 to 10^9")
        names.append("/".join(cells[:3]))
        rows.append(row.astype(np.float32))
        check_size(path, len(rows), DAY)
    if not rows:
        raise InputError(f"{path} has no functions")
    return Trace(path.stem, History(tuple(names), 0, np.stack(rows)), np.ones(len(rows)))


def _events(
    path: Path,
    heading: list[str],
    lines: Iterator[list[str]],
    of_row: Callable[[Row], tuple[str, float]],
    clients: bool,
) -> Trace:
    """One line per request, of which `of_row` takes series and arrival (seconds)."""
    names, minutes = [], []
    for number, cells in enumerate(lines, start=2):
        if not cells:
            continue
        if len(cells) != len(heading):
            raise _fault(path, number, f"{len(cells)} fields instead of {len(heading)}")
        try:
            name, at = of_row(dict(zip(heading, cells, strict=True)))
        except ValueError as error:
            raise _fault(path, number, str(error)) from None
        names.append(name)
        minutes.append(_minute(path, number, at))
    return from_events(path, names, np.array(minutes, np.int64), clients=clients)


def _mooncake(path: Path, file: Iterator[str]) -> Trace:
    """One JSON object per request, whose `timestamp` is in milliseconds."""
    minutes = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            request = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise _fault(path, number, str(error)) from None
        at = request.get("timestamp") if isinstance(request, dict) else None
        if isinstance(at, bool) or not isinstance(at, int | float):
            raise _fault(path, number, "no number named timestamp (milliseconds)")
        minutes.append(_minute(path, number, at / 1000))
    names = ["mooncake"] * len(minutes)
    return from_events(path, names, np.array(minutes, np.int64), clients=True)


def _minute(path: Path, number: int, at_s: float) -> int:
    if not math.isfinite(at_s) or abs(at_s) > _MAX_TIME_S:
        raise _fault(path, number, f"{at_s} is no time in seconds")
    return math.floor(at_s / 60)


def _azure_2021(row: Row) -> tuple[str, float]:
    """A trace of ends: a request arrived its duration earlier."""
    return f"{row['app']}/{row['func']}", float(row["end_timestamp"]) - float(row["duration"])


def _azure_llm(row: Row) -> tuple[str, float]:
    """Times such as 2023-11-16 18:17:03.9799600, taken as UTC."""
    at = datetime.datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
    return "azure-llm", at.replace(tzinfo=at.tzinfo or datetime.UTC).timestamp()


def _burstgpt(row: Row) -> tuple[str, float]:
    return f"{row['Model']}/{row['Log Type']}", float(row["Timestamp"])


def _fault(path: Path, line: int, reason: str) -> InputError:
    return InputError(f"{path}, line {line}: {reason}")


_AZURE_2019 = ["HashOwner", "HashApp", "HashFunction", "Trigger"]
_EVENTS = (
    (("app", "func", "end_timestamp", "duration"), _azure_2021, False),
    (("TIMESTAMP", "ContextTokens", "GeneratedTokens"), _azure_llm, True),
    (("Timestamp", "Model", "Log Type"), _burstgpt, True),
)
