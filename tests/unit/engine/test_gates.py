"""Where a forward waits for weights that are still on their way."""

from __future__ import annotations

import threading

import pytest

from flashserve.engine.gates import Gates
from flashserve.errors import CheckpointError, ReplicaError


class Waiter:
    """A thread that passes the gates in order and notes how far it came."""

    def __init__(self, gates: Gates) -> None:
        self.passed: list[int] = []
        self.error: Exception | None = None
        self._gates = gates
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for group in range(self._gates.num_groups):
                self._gates.wait(group)
                self.passed.append(group)
        except ReplicaError as error:
            self.error = error

    def end(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()


def test_who_waits_passes_each_gate_only_once_it_is_open() -> None:
    gates = Gates(4)
    gates.open(1)
    waiter = Waiter(gates)
    while gates.waited_s == 0.0:
        pass
    assert waiter.passed == [0]
    assert not gates.is_open
    gates.open(3)
    gates.open(2)  # stale
    while len(waiter.passed) < 3:
        pass
    assert waiter.passed == [0, 1, 2]
    gates.open(4)
    waiter.end()
    assert waiter.passed == [0, 1, 2, 3]
    assert gates.is_open


@pytest.mark.parametrize("num_open", range(4))
def test_a_failure_reaches_who_waits_and_who_comes_later(num_open: int) -> None:
    gates = Gates(4)
    gates.open(num_open)
    waiter = Waiter(gates)
    while gates.waited_s == 0.0:
        pass
    gates.fail(ReplicaError("the bytes will not come"))
    gates.fail(CheckpointError("a later reason"))
    waiter.end()
    assert waiter.passed == list(range(num_open))
    with pytest.raises(ReplicaError, match="will not come"):
        gates.wait(0)
    assert not gates.is_open


def test_time_counts_only_while_somebody_waits() -> None:
    gates = Gates(2)
    gates.open(2)
    gates.wait(0)
    gates.wait(1)
    assert gates.waited_s == 0.0
    held = Gates(1)
    waiter = Waiter(held)
    while held.waited_s == 0.0:
        pass
    so_far = held.waited_s
    held.open(1)
    waiter.end()
    assert held.waited_s >= so_far
    assert held.waited_s == held.waited_s
