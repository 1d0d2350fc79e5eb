"""Holds a forward back until the weights that it needs next have arrived.

The weights of a model come in groups, in the order in which a forward needs them: 0 is the
embedding, 1 + i decoder layer i, the last one the final norm and the head. Groups open as a
prefix: one that is open means that all before it are.
"""

from __future__ import annotations

import threading
import time

from flashserve.errors import FlashServeError, error_from_code

EMBEDDING = 0


def layer_group(index: int) -> int:
    return 1 + index


def num_groups(num_layers: int) -> int:
    return num_layers + 2


class Gates:
    """One thread waits here while another one opens. Thread-safe."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self._num_open = 0
        self._error: FlashServeError | None = None
        self._waited_s = 0.0
        self._waiting_since: float | None = None
        self._changed = threading.Condition()

    @property
    def is_open(self) -> bool:
        """Whether nobody will ever wait here again."""
        return self._num_open >= self.num_groups and self._error is None

    @property
    def failure(self) -> FlashServeError | None:
        """Why the rest will not come."""
        return self._error

    @property
    def waited_s(self) -> float:
        """Seconds that were spent waiting so far, a wait under way included."""
        with self._changed:
            since = self._waiting_since
            return self._waited_s + (0.0 if since is None else time.monotonic() - since)

    def open(self, num_open: int) -> None:
        """The weights of groups [0, num_open) are there. They never go: a lower number is stale."""
        with self._changed:
            self._num_open = max(self._num_open, num_open)
            self._changed.notify_all()

    def fail(self, error: FlashServeError) -> None:
        """The rest will not come: this and every later wait raises `error`; the first one stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def wait(self, group: int) -> None:
        """Returns once `group` is open.

        Raises:
            FlashServeError: what the gates failed with.
        """
        with self._changed:
            if self._num_open <= group and self._error is None:
                self._waiting_since = time.monotonic()
                self._changed.wait_for(lambda: self._num_open > group or self._error is not None)
                self._waited_s += time.monotonic() - self._waiting_since
                self._waiting_since = None
            if self._error is not None:
                # A new one each time: a kept one would hold on to the frames that it passed.
                raise error_from_code(self._error.code, self._error.message)
