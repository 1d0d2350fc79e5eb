import contextlib
import hashlib
import os
import queue
import threading
from collections.abc import Iterator

import blake3
import numpy as np
import pytest

from flashserve.store import digest
from flashserve.store.digest import Digester

DATA = np.random.default_rng(0).integers(0, 256, 5001, dtype=np.uint8).tobytes()
MD5 = hashlib.md5(DATA).hexdigest()
SHA256 = hashlib.sha256(DATA).hexdigest()
BLAKE3 = blake3.blake3(DATA).hexdigest()


@pytest.fixture
def digester():
    digester = Digester()
    yield digester
    digester.stop()


class Results:
    """What a digester says, waited for."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[str, str | None]] = queue.Queue()

    def __call__(self, found: str, mismatch: str | None) -> None:
        self._queue.put((found, mismatch))

    def next(self) -> tuple[str, str | None]:
        return self._queue.get(timeout=60)


def pieces() -> Iterator[contextlib.AbstractContextManager[memoryview] | None]:
    for begin in range(0, len(DATA), 1000):
        yield memoryview(DATA)[begin : begin + 1000]


@pytest.mark.parametrize(
    "promised",
    [
        [],
        [("md5", MD5)],
        [("sha256", SHA256.upper())],
        [("md5", MD5), ("sha256", SHA256), ("blake3", BLAKE3)],
    ],
)
def test_bytes_that_keep_what_was_promised(digester, promised):
    results = Results()
    digester.submit(pieces, promised, results)
    assert results.next() == (BLAKE3, None)


@pytest.mark.parametrize(
    "promised",
    [
        [("md5", "0" * 32)],
        [("blake3", "0" * 64)],
        [("md5", MD5), ("sha256", SHA256[:-1] + "x")],
        [("md5", "")],
    ],
)
def test_bytes_that_do_not_are_told_with_both_digests(digester, promised):
    name, wanted = promised[-1]
    found = {"md5": MD5, "sha256": SHA256, "blake3": BLAKE3}[name]
    results = Results()
    digester.submit(pieces, promised, results)
    assert results.next() == (BLAKE3, f"its {name} is {found}, but its origin promised {wanted}")


def test_an_empty_file_has_a_digest_too(digester):
    results = Results()
    digester.submit(lambda: iter(()), [], results)
    assert results.next() == (blake3.blake3().hexdigest(), None)


def test_an_unknown_algorithm_is_refused_at_once(digester):
    with pytest.raises(ValueError, match="crc99"):
        digester.submit(pieces, [("crc99", "00")], Results())


def test_bytes_that_are_gone_are_passed_over(digester):
    gone, results = Results(), Results()
    digester.submit(lambda: iter([memoryview(DATA), None]), [("md5", MD5)], gone)
    digester.submit(pieces, [], results)
    assert results.next() == (BLAKE3, None)
    assert gone._queue.empty()


def test_a_job_that_fails_is_logged_and_the_next_one_is_done(digester, caplog):
    results = Results()
    digester.submit(lambda: iter([object()]), [], results)
    digester.submit(pieces, [], results)
    assert results.next() == (BLAKE3, None)
    assert "a digest could not be computed" in caplog.text


def test_nothing_is_held_when_the_digest_is_told(digester):
    held: queue.Queue[bool] = queue.Queue()
    is_held = False

    @contextlib.contextmanager
    def holding():
        nonlocal is_held
        is_held = True
        yield memoryview(DATA)
        is_held = False

    digester.submit(lambda: iter([holding()]), [], lambda *_: held.put(is_held))
    assert held.get(timeout=60) is False


def test_it_runs_at_low_priority_alone(digester):
    priorities: queue.Queue[int] = queue.Queue()
    digester.submit(
        pieces,
        [],
        lambda *_: priorities.put(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    assert priorities.get(timeout=60) > os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


def test_stopping_ends_what_is_under_way_and_what_waits(monkeypatch):
    """The sum pauses in its first piece until the digester is stopping, and gets no second one."""
    num_threads = threading.active_count()
    entered = threading.Event()
    digester = Digester()
    sizes: list[int] = []

    class Slow:
        def update(self, data: memoryview) -> None:
            sizes.append(len(data))
            entered.set()
            digester._stopping.wait()

        def hexdigest(self) -> str:
            return ""

    monkeypatch.setattr(digest.blake3, "blake3", Slow)
    results = Results()
    digester.submit(pieces, [], results)
    digester.submit(pieces, [], results)
    entered.wait()
    digester.stop()
    assert sizes == [1000]
    assert results._queue.empty()
    assert threading.active_count() == num_threads
