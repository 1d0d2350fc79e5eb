"""Whether all models can have the replicas that each is always to have, at any time of the week."""

from __future__ import annotations

import collections
from collections.abc import Mapping

from flashserve.errors import InputError
from flashserve.policy.schedules import Bounds, edges, minimum_at
from flashserve.types import ModelId

_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MAX_SHOWN = 5


def check_minimums(
    model_id: ModelId, bounds: Bounds, others: Mapping[ModelId, Bounds], num_workers: int
) -> None:
    """Refuse a minimum that cannot be kept beside those of the other models.

    Costs what the schedules of all of them have lines. Where the others alone ask for too much,
    that is not this model's doing: it is refused only for times at which it has a minimum itself.

    Raises:
        InputError: one line that names the field, the time where there is one, and who asks for
            how many.
    """
    changes: collections.defaultdict[int, int] = collections.defaultdict(int)
    for other in others.values():
        _add_changes(changes, other)
    own: collections.defaultdict[int, int] = collections.defaultdict(int)
    _add_changes(own, bounds)
    asked = mine = 0
    for minute in sorted(changes.keys() | own.keys()):
        asked += changes[minute]
        mine += own[minute]
        if mine > 0 and asked + mine > num_workers:
            raise _refusal(model_id, bounds, others, minute, num_workers)


def _add_changes(changes: dict[int, int], bounds: Bounds) -> None:
    """By how much the minimum changes in which minute of the week."""
    before = 0
    for minute in edges(bounds):
        least = minimum_at(bounds, minute)
        if least != before:
            changes[minute] += least - before
        before = least


def _refusal(
    model_id: ModelId,
    bounds: Bounds,
    others: Mapping[ModelId, Bounds],
    minute: int,
    num_workers: int,
) -> InputError:
    least = {name: minimum_at(other, minute) for name, other in others.items()}
    takers = [f"{name} {number}" for name, number in sorted(least.items()) if number]
    more = f" and {len(takers) - _MAX_SHOWN} more" if len(takers) > _MAX_SHOWN else ""
    mine = minimum_at(bounds, minute)
    by_schedule = mine != (bounds.min_replicas or 0)
    is_timed = by_schedule or any(others[name].schedule for name, number in least.items() if number)
    return InputError(
        f"min_replicas is {mine} for {model_id}{_time(minute) if is_timed else ''}, and "
        f"{', '.join(takers[:_MAX_SHOWN])}{more} for others: together above the "
        f"{num_workers} workers that there are (node.num_workers)",
        param="schedule" if by_schedule else "min_replicas",
    )


def _time(minute: int) -> str:
    return f" on {_DAYS[minute // 1440]} at {minute % 1440 // 60:02}:{minute % 60:02}"
