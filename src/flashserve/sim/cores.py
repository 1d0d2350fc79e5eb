"""Cores that the workers of a node share: who computes beside others computes slower.

As many tasks as there is room for go at full speed; more of them share it equally, as processes do
on the cores of one machine. A task is an engine that is in a step, or a start that builds a module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable

from flashserve.sim.links import CallAt

Paced = Callable[[float, float], None]
"""Told by which factor everything takes longer from a time on."""


class Cores:
    """Args:
    at_once: how many tasks' worth of work all of them together do; None: each has its own.
    """

    def __init__(self, call_at: CallAt, at_once: float | None) -> None:
        self._call_at = call_at
        self._at_once = at_once
        self._tasks: dict[Hashable, Paced] = {}
        self.stretch = 1.0

    @property
    def are_shared(self) -> bool:
        return self._at_once is not None

    def begin(self, task: Hashable, paced: Paced, now: float) -> None:
        """A task computes from now on; one that does so already may say it again."""
        if self._at_once is None or task in self._tasks:
            return
        self._tasks[task] = paced
        paced(self.stretch, now)  # which may be another than when it computed last
        self._repace(now)

    def end(self, task: Hashable, now: float) -> None:
        """It computes no more; one that did not is ignored."""
        if self._tasks.pop(task, None) is not None:
            self._repace(now)

    def work(self, seconds: float, now: float, done: Callable[[float], None]) -> None:
        """A task of so many seconds at full speed."""
        if self._at_once is None:
            self._call_at(now + seconds, done)
            return
        work = _Work(self, self._call_at, seconds, now, done)
        self.begin(work, work.pace, now)

    def _repace(self, now: float) -> None:
        assert self._at_once is not None
        stretch = max(1.0, len(self._tasks) / self._at_once)
        if stretch != self.stretch:
            self.stretch = stretch
            for paced in tuple(self._tasks.values()):
                paced(stretch, now)


@dataclasses.dataclass(slots=True, eq=False)
class _Work:
    """left_s: at full speed, when `since` was."""

    cores: Cores
    call_at: CallAt
    left_s: float
    since: float
    done: Callable[[float], None]
    stretch: float = 1.0
    due_at: float | None = None

    def pace(self, stretch: float, now: float) -> None:
        self.left_s = max(self.left_s - (now - self.since) / self.stretch, 0.0)
        self.since, self.stretch = now, stretch
        due = now + self.left_s * stretch
        if due != self.due_at:
            self.due_at = due
            self.call_at(due, self._due)

    def _due(self, now: float) -> None:
        if now == self.due_at:  # else planned before the pace changed
            self.due_at = None
            self.cores.end(self, now)
            self.done(now)
