"""What the range reader makes of answers; real connections are in the integration tests."""

import http.client
import ssl

import pytest

from flashserve.config import StoreSettings
from flashserve.errors import SourceError, UnavailableError
from flashserve.store.sources import ranges
from flashserve.store.sources.connections import Place, is_protected
from flashserve.store.sources.ranges import RangeReader
from flashserve.store.sources.rate import RateLimit

HUGE = 1 << 40
PLACE = Place("https://store.example/bucket/key?signature=secret", {})


class FakeAnswer:
    def __init__(self, status, headers=(), body=b""):
        self.status = status
        self.headers = dict(headers)
        self.body = body
        self.is_finished = False

    def read_into(self, target):
        count = min(len(target), len(self.body))
        target[:count], self.body = self.body[:count], self.body[count:]
        return count

    def read_error(self):
        return self.body.decode()

    def finish(self):
        self.is_finished = True


class FakePool:
    """Gives what it was told to, one thing after another."""

    def __init__(self, *script):
        self.script = list(script)
        self.asked = []

    def get(self, place, headers):
        self.asked.append(headers["Range"])
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step, place

    def close(self):
        pass


def reader_of(pool, num_bytes=100, draw=lambda: 1.0, **settings):
    waits = []
    reader = RangeReader(
        "bucket/key",
        num_bytes,
        lambda renew: PLACE,
        StoreSettings(**settings),
        RateLimit(0),
        wait=waits.append,
        draw=draw,
    )
    reader._pool = pool
    return reader, waits


def part(begin, data, total=100):
    span = f"bytes {begin}-{begin + len(data) - 1}/{total}"
    return FakeAnswer(206, {"Content-Range": span, "Content-Length": str(len(data))}, data)


def read(reader, begin, num_bytes):
    target = bytearray(num_bytes)
    reader.read(begin, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("reset"),
        TimeoutError("timed out"),
        OSError("no route"),
        http.client.RemoteDisconnected("gone"),
        http.client.IncompleteRead(b""),
        ssl.SSLError("broken record"),
    ],
)
def test_a_connection_that_fails_is_tried_again(error):
    reader, waits = reader_of(FakePool(error, part(10, b"abc")))
    assert read(reader, 10, 3) == b"abc"
    assert len(waits) == 1


def test_a_certificate_that_is_not_trusted_is_no_passing_fault():
    pool = FakePool(ssl.SSLCertVerificationError("self-signed"))
    reader, waits = reader_of(pool)
    with pytest.raises(SourceError, match="self-signed"):
        read(reader, 0, 3)
    assert waits == []


def test_delays_double_to_a_limit_and_are_spread():
    for draw, first in ((0.0, 0.1), (1.0, 0.2)):
        pool = FakePool(*(OSError("down") for _ in range(11)))
        reader, waits = reader_of(pool, draw=lambda draw=draw: draw, remote_retries=10)
        with pytest.raises(SourceError, match="tried 11 times: down"):
            read(reader, 0, 3)
        assert waits[0] == pytest.approx(first)
        assert waits[1] == pytest.approx(2 * first)
        assert waits[-1] == pytest.approx(100 * first)


def test_a_server_cannot_ask_for_endless_patience():
    busy = FakeAnswer(503, {"Retry-After": "86400"})
    reader, waits = reader_of(FakePool(busy, part(0, b"abc")))
    assert read(reader, 0, 3) == b"abc"
    assert waits == [60.0]


def test_a_range_in_several_parts_is_put_together():
    pool = FakePool(part(10, b"ab"), part(12, b"cd"))
    reader, _ = reader_of(pool)
    assert read(reader, 10, 4) == b"abcd"
    assert pool.asked == ["bytes=10-13", "bytes=12-13"]


@pytest.mark.parametrize(
    "span",
    [
        "bytes 9-12/100",
        "bytes 11-13/100",
        "bytes 10-14/100",
        "bytes 10-9/100",
        "bytes */100",
        "10-13/100",
        "bytes 10-" + "9" * 100 + "/100",
        "bytes 10-13/100, bytes 20-23/100",
    ],
)
def test_a_part_that_was_not_asked_for_is_not_taken(span):
    answer = FakeAnswer(206, {"Content-Range": span, "Content-Length": "4"}, b"xxxx")
    reader, waits = reader_of(FakePool(answer, part(10, b"abcd")))
    assert read(reader, 10, 4) == b"abcd"
    assert answer.is_finished
    assert len(waits) == 1


def test_a_part_without_a_range_is_not_taken():
    answer = FakeAnswer(206, {"Content-Length": "4"}, b"xxxx")
    reader, _ = reader_of(FakePool(answer, part(10, b"abcd")))
    assert read(reader, 10, 4) == b"abcd"


def test_a_server_of_whole_files_is_not_endured_for_ever():
    answer = FakeAnswer(200, {"Content-Length": str(HUGE)})
    reader, _ = reader_of(FakePool(answer), num_bytes=HUGE)
    with pytest.raises(SourceError, match="whole files, not ranges"):
        read(reader, ranges.MAX_SKIPPED_BYTES + 4096, 4096)
    assert answer.is_finished


def test_a_whole_file_of_no_stated_length_is_skipped_to_the_range():
    reader, _ = reader_of(FakePool(FakeAnswer(200, body=bytes(10) + b"abcd" + bytes(86))))
    assert read(reader, 10, 4) == b"abcd"


def test_messages_hold_no_secrets():
    reader, _ = reader_of(FakePool(FakeAnswer(403), FakeAnswer(403)))
    with pytest.raises(SourceError) as caught:
        read(reader, 0, 3)
    assert caught.value.message == "bucket/key cannot be read: 'store.example' answers 403"


def test_nothing_is_read_after_closing():
    pool = FakePool(part(0, b"abc"))
    reader, _ = reader_of(pool)
    reader.close()
    with pytest.raises(UnavailableError):
        read(reader, 0, 3)
    assert pool.asked == []


def test_reading_nothing_asks_for_nothing():
    pool = FakePool()
    reader, _ = reader_of(pool)
    assert read(reader, 100, 0) == b""
    assert pool.asked == []


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://s3.example.org", True),
        ("http://127.0.0.1:9000", True),
        ("http://[::1]:9000", True),
        ("http://localhost", True),
        ("http://s3.example.org", False),
        ("http://10.0.0.7", False),
        ("http://localhost.example.org", False),
        ("http://", False),
    ],
)
def test_plain_http_is_protected_on_this_machine_only(url, expected):
    assert is_protected(url) is expected
