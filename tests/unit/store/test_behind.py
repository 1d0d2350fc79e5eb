import logging
import os
import threading

from flashserve.errors import UnavailableError
from flashserve.store.behind import WriteBehind


class FakeIncoming:
    """Records what a disk tier would write."""

    def __init__(self, full_after: int = 1000) -> None:
        self.calls: list[tuple] = []
        self.full_after = full_after
        self.may_write = threading.Event()
        self.may_write.set()

    def write_chunk(self, name: str, index: int, data: memoryview, checksum: int) -> None:
        self.may_write.wait()
        if len(self.calls) >= self.full_after:
            raise UnavailableError("the disk tier is full")
        self.calls.append((name, index, bytes(data), checksum))

    def complete(self) -> None:
        self.calls.append(("complete",))

    def abandon(self, keep: bool) -> None:
        self.calls.append(("abandon", keep))


def write(incoming: FakeIncoming, *, is_whole: bool, num: int = 3) -> list[bool]:
    ends: list[bool] = []
    behind = WriteBehind("s3://b/m", incoming, ends.append)
    memory = bytearray(b"abcdef")
    with memoryview(memory) as view:
        for index in range(num):
            with view[index : index + 1] as data:
                behind.put("w", index, data, index * 10)
    behind.end(is_whole=is_whole)
    behind.join()
    memory.extend(b"x")  # raises while a view is left
    return ends


def test_all_chunks_are_written_in_order_then_the_checkpoint_is_complete():
    incoming = FakeIncoming()
    assert write(incoming, is_whole=True) == [True]
    assert incoming.calls == [
        ("w", 0, b"a", 0),
        ("w", 1, b"b", 10),
        ("w", 2, b"c", 20),
        ("complete",),
    ]


def test_a_load_that_failed_leaves_a_part_that_can_be_resumed():
    incoming = FakeIncoming()
    assert write(incoming, is_whole=False) == [False]
    assert incoming.calls[-1] == ("abandon", True)


def test_a_full_disk_turns_writing_off_with_one_line(caplog):
    incoming = FakeIncoming(full_after=1)
    with caplog.at_level(logging.WARNING):
        assert write(incoming, is_whole=True) == [False]
    assert incoming.calls == [("w", 0, b"a", 0), ("abandon", False)]
    assert [record.getMessage() for record in caplog.records] == [
        "s3://b/m is not kept on disk: the disk tier is full"
    ]


def test_stopping_writes_no_more_and_nobody_who_reads_waits():
    incoming = FakeIncoming()
    incoming.may_write.clear()
    ends: list[bool] = []
    behind = WriteBehind("s3://b/m", incoming, ends.append)
    for index in range(5):
        behind.put("w", index, memoryview(b"x"), 0)  # does not wait for the disk
    behind.stop()
    incoming.may_write.set()
    behind.end(is_whole=True)
    behind.join()
    assert ends == [False]
    assert len(incoming.calls) <= 2
    assert incoming.calls[-1] == ("abandon", True)


def test_the_writing_thread_steps_back_behind_those_that_read():
    incoming = FakeIncoming()
    priorities: list[int] = []
    here = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    behind = WriteBehind(
        "s3://b/m",
        incoming,
        lambda _: priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id())),
    )
    behind.end(is_whole=True)
    behind.join()
    assert priorities == [max(here, 10)]
