"""A path over which bytes move: moves that are under way at once share its rate equally."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

CallAt = Callable[[float, Callable[[float], None]], object]
"""Has a function called at a time, with that time."""

_EPSILON = 1e-9


class Move(msgspec.Struct, eq=False):
    """Bytes under way; `end` is the reading of the link's meter at which they are there."""

    end: float
    done: Callable[[float], None]


class Link:
    """The meter counts the bytes that each move has made so far, from the first one on.

    Args:
        bytes_per_s: of all moves together.
        each_bytes_per_s: at most, of each; None: one move alone has all.
    """

    def __init__(
        self, call_at: CallAt, bytes_per_s: float, each_bytes_per_s: float | None = None
    ) -> None:
        self._call_at = call_at
        self._bytes_per_s = bytes_per_s
        self._each = each_bytes_per_s or bytes_per_s
        self._meter = 0.0
        self._read_at = 0.0
        self._moves: list[Move] = []
        self._due_at: float | None = None

    @property
    def num_moves(self) -> int:
        return len(self._moves)

    def send(self, num_bytes: float, now: float, done: Callable[[float], None]) -> Move:
        """Begin a move; `done` is called when it is over."""
        self._advance(now)
        move = Move(self._meter + num_bytes, done)
        self._moves.append(move)
        self._plan(now)
        return move

    def cancel(self, move: Move, now: float) -> None:
        """Its bytes move no more; one that is over is ignored."""
        if move in self._moves:
            self._advance(now)
            self._moves.remove(move)
            self._plan(now)

    def close(self) -> None:
        """Nothing moves any more, and nobody is told."""
        self._moves.clear()
        self._due_at = None

    @property
    def _rate(self) -> float:
        return min(self._each, self._bytes_per_s / len(self._moves))

    def _advance(self, now: float) -> None:
        if self._moves:
            self._meter += self._rate * (now - self._read_at)
        else:
            self._meter = 0.0
        self._read_at = now

    def _plan(self, now: float) -> None:
        if not self._moves:
            self._due_at = None
            return
        left = min([move.end for move in self._moves]) - self._meter
        due = now + max(left, 0.0) / self._rate
        if due != self._due_at:
            self._due_at = due
            self._call_at(due, self._due)

    def _due(self, now: float) -> None:
        if now != self._due_at:  # planned before another move began or ended
            return
        self._due_at = None
        if len(self._moves) == 1:
            self._moves.pop().done(now)
            return
        self._advance(now)
        nearest = min(move.end for move in self._moves)
        self._meter = max(self._meter, nearest)
        reached = self._meter * (1 + _EPSILON)
        over = [move for move in self._moves if move.end <= reached]
        self._moves = [move for move in self._moves if move.end > reached]
        self._plan(now)
        for move in over:
            move.done(now)
