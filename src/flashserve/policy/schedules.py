"""A model's bounds on replicas, and how they follow a weekly schedule.

A schedule is a list of lines such as "mon-fri 08:00-18:00 min=1 max=4". What holds is a function of
the local time alone, so it is right at once after a restart, a set clock or a change to summer
time: an hour that comes twice is in force twice, one that is left out is not.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import re
from collections.abc import Callable, Iterable, Sequence

from flashserve.errors import InputError
from flashserve.types import Scaling

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_WEEK_MINUTES = 7 * _DAY_MINUTES
_MAX_LINES = 64
_MAX_REPLICAS = 100_000
_TIMES = re.compile(r"([0-9]{1,2}):([0-9]{2})-([0-9]{1,2}):([0-9]{2})")
_FIELDS = {"min": "min_replicas", "max": "max_replicas", "target": "target"}
_EXAMPLE = "such as 'mon-fri 08:00-18:00 min=1'"


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """One line of a schedule: what it sets, in which minutes of the week.

    spans: [start, end) in minutes since Monday 00:00, within the week. None: not set.
    """

    line: str
    spans: tuple[tuple[int, int], ...]
    min_replicas: int | None = None
    max_replicas: int | None = None
    target: int | None = None

    def holds(self, minute: int) -> bool:
        return any(start <= minute < end for start, end in self.spans)


@dataclasses.dataclass(frozen=True, slots=True)
class Bounds:
    """What a deployment says of its model's replicas. None follows the server."""

    min_replicas: int | None = None
    max_replicas: int | None = None
    target: int | None = None
    schedule: tuple[str, ...] = ()
    """Lines as they were given."""

    @property
    def windows(self) -> tuple[Window, ...]:
        return tuple(map(parse_line, self.schedule))


NO_BOUNDS = Bounds()
"""Of a model that is deployed without any."""


def scaling_at(bounds: Bounds, local: datetime.datetime, target: int | None = None) -> Scaling:
    """What holds at that local time.

    Args:
        target: the server's, for a model that has none.
    """
    return _scaling_in(bounds, minute_of_week(local), target)


def minute_of_week(local: datetime.datetime) -> int:
    """Since Monday 00:00, by the clock on the wall."""
    return local.weekday() * _DAY_MINUTES + local.hour * 60 + local.minute


def check_bounds(bounds: Bounds, num_workers: int) -> None:
    """Refuse bounds that cannot be met at some time of the week.

    Raises:
        InputError: one line that names the field and what contradicts it.
    """
    if len(bounds.schedule) > _MAX_LINES:
        raise InputError(
            f"schedule has {len(bounds.schedule)} lines, at most {_MAX_LINES} are taken",
            param="schedule",
        )
    _check_scaling(_scaling(bounds, ()), num_workers, "")
    windows = bounds.windows
    for minute in edges(bounds):
        holding = [window for window in windows if window.holds(minute)]
        if holding:
            _check_agreement(holding)
            lines = " with ".join(repr(window.line) for window in holding)
            _check_scaling(_scaling(bounds, holding), num_workers, f"schedule {lines}: ")


def edges(bounds: Bounds) -> list[int]:
    """The minutes of the week at which what holds may change, the first among them; ascending."""
    spans = [span for window in bounds.windows for span in window.spans]
    return sorted({0, *(edge for span in spans for edge in span)} - {_WEEK_MINUTES})


def minimum_at(bounds: Bounds, minute: int) -> int:
    """How many replicas the model always has in that minute of the week."""
    return _scaling_in(bounds, minute, None).min_replicas


@functools.lru_cache(maxsize=4096)
def parse_line(line: str) -> Window:
    """A line of a schedule: DAYS HH:MM-HH:MM and at least one of min=N, max=N, target=N.

    DAYS is daily, a day (mon), a range (fri-mon) or several of them with commas. An end before its
    start is on the next day; 24:00 is the end of the day.

    Raises:
        InputError: it is none; says which part, and what would be one.
    """
    words = line.lower().split()
    if len(words) < 3:
        raise _bad(line, f"it needs days, times and a bound, {_EXAMPLE}")
    days, times, *settings = words
    values = _parse_settings(line, settings)
    start, length = _parse_times(line, times)
    spans = [span for day in _parse_days(line, days) for span in _spans(day, start, length)]
    return Window(line, tuple(sorted(spans)), **values)


def _parse_days(line: str, words: str) -> list[int]:
    if words == "daily":
        return list(range(7))
    days: dict[int, None] = {}
    for part in words.split(","):
        first, _, last = part.partition("-")
        if first not in _DAYS or (last or first) not in _DAYS or part.endswith("-"):
            raise _bad(line, f"{part!r} is no day: use {', '.join(_DAYS)}, mon-fri or daily")
        begin, end = _DAYS.index(first), _DAYS.index(last or first)
        days |= dict.fromkeys((begin + i) % 7 for i in range((end - begin) % 7 + 1))
    return list(days)


def _parse_times(line: str, words: str) -> tuple[int, int]:
    """Start in minutes of the day, and length in minutes."""
    match = _TIMES.fullmatch(words)
    if match is None:
        raise _bad(line, f"{words!r} is no span of time: use HH:MM-HH:MM")
    hour, minute, end_hour, end_minute = map(int, match.groups())
    start, end = hour * 60 + minute, end_hour * 60 + end_minute
    if minute > 59 or end_minute > 59 or start >= _DAY_MINUTES or end > _DAY_MINUTES:
        raise _bad(line, f"{words!r} is no span of time: a day goes from 00:00 to 24:00")
    if start == end:
        raise _bad(line, f"{words!r} is empty: 00:00-24:00 is the whole day")
    return start, (end - start) % _DAY_MINUTES or _DAY_MINUTES


def _parse_settings(line: str, words: Iterable[str]) -> dict[str, int]:
    values: dict[str, int] = {}
    for word in words:
        key, _, value = word.partition("=")
        field = _FIELDS.get(key)
        if field is None or not re.fullmatch(r"[0-9]{1,6}", value):
            raise _bad(line, f"{word!r} is no bound: use min=N, max=N or target=N")
        if field in values:
            raise _bad(line, f"{key} is given twice")
        values[field] = int(value)
    return values


def _spans(day: int, start: int, length: int) -> Iterable[tuple[int, int]]:
    """[start, end) in minutes of the week; in two parts where the week ends between."""
    begin = day * _DAY_MINUTES + start
    end = begin + length
    if end <= _WEEK_MINUTES:
        return [(begin, end)]
    return [(begin, _WEEK_MINUTES), (0, end - _WEEK_MINUTES)]


def _scaling_in(bounds: Bounds, minute: int, target: int | None) -> Scaling:
    scaling = _scaling(bounds, [w for w in bounds.windows if w.holds(minute)])
    return scaling if scaling.target else dataclasses.replace(scaling, target=target)


def _scaling(bounds: Bounds, holding: Sequence[Window]) -> Scaling:
    """The bounds with what windows set over them; windows that hold together agree."""
    return Scaling(
        _last(bounds.min_replicas, holding, lambda w: w.min_replicas) or 0,
        _last(bounds.max_replicas, holding, lambda w: w.max_replicas),
        _last(bounds.target, holding, lambda w: w.target),
    )


def _last(
    own: int | None, windows: Sequence[Window], value_of: Callable[[Window], int | None]
) -> int | None:
    values = [value for window in windows if (value := value_of(window)) is not None]
    return values[-1] if values else own


def _check_agreement(holding: Sequence[Window]) -> None:
    for key, field in _FIELDS.items():
        lines = {getattr(w, field): w.line for w in holding if getattr(w, field) is not None}
        if len(lines) > 1:
            one, other, *_ = lines.values()
            raise InputError(
                f"schedule {one!r} and {other!r} overlap and contradict each other on {key}",
                param="schedule",
            )


def _check_scaling(scaling: Scaling, num_workers: int, where: str) -> None:
    """Args: where: the lines of the schedule that are to blame, for the message."""

    def refuse(field: str, why: str) -> InputError:
        return InputError(f"{where}{field} {why}", param="schedule" if where else field)

    least, most = scaling.min_replicas, scaling.max_replicas
    if least < 0:
        raise refuse("min_replicas", f"is {least}, not a number from 0")
    if most is not None and not 1 <= most <= _MAX_REPLICAS:
        raise refuse("max_replicas", f"is {most}, not a number from 1")
    if scaling.target is not None and scaling.target < 1:
        raise refuse("target", f"is {scaling.target}, not a number from 1")
    if most is not None and least > most:
        raise refuse("min_replicas", f"is {least}, above max_replicas, which is {most}")
    if least > num_workers:
        raise refuse(
            "min_replicas",
            f"is {least}, above the {num_workers} workers that there are (node.num_workers)",
        )


def _bad(line: str, why: str) -> InputError:
    return InputError(f"schedule {line[:100]!r}: {why}", param="schedule")
