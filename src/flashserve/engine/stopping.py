"""Finds stop strings in text that arrives in pieces, without ever letting part of one out."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text on up to the first stop string.

    The first stop is the one whose last character comes first, the longest of those that end
    there, so that the result does not depend on how the text was cut into pieces. Text that may
    yet turn out to begin a stop is held back.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes the next piece; returns what may be emitted now and whether a stop was met."""
        if self._stopped or not self._stops:
            return ("" if self._stopped else text), self._stopped
        text = self._held + text
        begin = self._first_stop(text)
        if begin is not None:
            self._stopped, self._held = True, ""
            return text[:begin], True
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], False

    def flush(self) -> str:
        """What is still held back, once no more text will come."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        return min(found)[1] if found else None

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop."""
        longest = max(len(stop) for stop in self._stops) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return length
        return 0
