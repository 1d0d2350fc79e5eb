"""Rows of a follower's state: series come and go, and the state is written down and read back.

A follower holds arrays in which one axis is the series, at any depth of objects and lists. Which
axis that is shows in two new followers of different numbers of series; what both share by identity
(weights, a pool) belongs to the model, and is neither moved nor written. Numbers beside the arrays
are state too; one that is called `minute` is the follower's clock.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Follower, FollowingModel

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.intp]
State = dict[str, Array | int | float | bool]

_CLOCKS = ("minute", "_minute")
_SEPARATOR = "."


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where an array or number lies below a follower; axis: of its series, None where it has none.

    shape: of the array for one series, None of a number.
    """

    path: tuple[str | int, ...]
    axis: int | None
    shape: tuple[int, ...] | None

    @property
    def name(self) -> str:
        return _SEPARATOR.join(map(str, self.path))

    def read(self, follower: object) -> Any:
        for step in self.path:
            follower = _child(follower, step)
        return follower

    def write(self, follower: object, value: object) -> None:
        for step in self.path[:-1]:
            follower = _child(follower, step)
        last = self.path[-1]
        if isinstance(follower, (list, dict)):
            follower[last] = value  # type: ignore[index]
        else:
            setattr(follower, str(last), value)


class Layout:
    """How the state of a model's followers is laid out."""

    def __init__(self, model: FollowingModel) -> None:
        one, two = model.follow(("a",), 0), model.follow(("a", "b"), 0)
        self._places = list(_places(one, two, ()))

    def join(self, follower: Follower, more: Follower) -> None:
        """Append the series of `more`; numbers and what all series share stay as they are."""
        for place in self._of_series():
            both = [place.read(follower), place.read(more)]
            place.write(follower, np.concatenate(both, axis=place.axis))
        _refresh(follower)

    def overwrite(self, follower: Follower, rows: Rows, fresh: Follower) -> None:
        """Put the series of `fresh` in the place of those in `rows`."""
        for place in self._of_series():
            table = np.moveaxis(place.read(follower), place.axis or 0, 0)
            table[rows] = np.moveaxis(place.read(fresh), place.axis or 0, 0)
        _refresh(follower)

    def set_minute(self, follower: Follower, minute: int) -> None:
        """Set its clock, without telling it that time went by."""
        for place in self._places:
            if place.path[-1] in _CLOCKS:
                place.write(follower, minute)

    def export(self, follower: Follower) -> State:
        """Copies of all arrays and numbers, by their place."""
        state: State = {}
        for place in self._places:
            value = place.read(follower)
            state[place.name] = value.copy() if isinstance(value, np.ndarray) else value
        return state

    def restore(self, follower: Follower, state: State, num_series: int) -> None:
        """Put an exported state into a new follower of as many series.

        Raises:
            InputError: the state is not that of such a follower.
        """
        if missing := [place.name for place in self._places if place.name not in state]:
            raise InputError(f"the forecaster's state has no {missing[0]}: replay the history")
        for place in self._places:
            value = state[place.name]
            now = place.read(follower)
            if place.shape is None:
                place.write(follower, type(now)(value))
                continue
            table = np.array(value, dtype=now.dtype)
            if not _fits(place, table.shape, num_series):
                raise InputError(
                    f"{place.name} of the forecaster's state has the shape {table.shape}: "
                    "replay the history"
                )
            place.write(follower, table)
        _refresh(follower)

    def _of_series(self) -> Iterator[_Place]:
        return (place for place in self._places if place.axis is not None)


def _refresh(follower: Follower) -> None:
    """A follower that keeps what follows from its state has a method that drops it."""
    if refresh := getattr(follower, "refresh", None):
        refresh()


def _fits(place: _Place, shape: tuple[int, ...], num_series: int) -> bool:
    assert place.shape is not None
    if place.axis is None:  # it may grow with time
        return len(shape) == len(place.shape)
    wanted = list(place.shape)
    wanted[place.axis] = num_series
    return shape == tuple(wanted)


def _places(one: object, two: object, path: tuple[str | int, ...]) -> Iterator[_Place]:
    """Walk two followers of one and of two series side by side."""
    if isinstance(one, np.ndarray) and isinstance(two, np.ndarray):
        if one is two:
            return
        differ = [
            axis
            for axis, sizes in enumerate(zip(one.shape, two.shape, strict=True))
            if sizes[0] != sizes[1]
        ]
        assert len(differ) <= 1, f"{path}: an array has at most one axis of series"
        yield _Place(path, differ[0] if differ else None, one.shape)
    elif isinstance(one, (bool, int, float, np.number)):
        yield _Place(path, None, None)
    elif one is not two:
        for step in _steps(one):
            yield from _places(_child(one, step), _child(two, step), (*path, step))


def _steps(parent: object) -> list[str | int]:
    if isinstance(parent, dict):
        return list(parent)
    if isinstance(parent, (list, tuple)):
        return list(range(len(parent)))
    return list(getattr(parent, "__dict__", ()))


def _child(parent: object, step: str | int) -> Any:
    if isinstance(parent, (list, tuple, dict)):
        return parent[step]  # type: ignore[index]
    return getattr(parent, str(step))
