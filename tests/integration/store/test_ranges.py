"""The range reader against a server that misbehaves on demand."""

import concurrent.futures
import random
import threading

import pytest
from tests.integration.store.faulty import FaultyServer

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError, UnavailableError
from flashserve.store.sources.connections import Place
from flashserve.store.sources.ranges import RangeReader
from flashserve.store.sources.rate import RateLimit

DATA = random.Random(7).randbytes(1_500_000)
NUM_BYTES = len(DATA)


@pytest.fixture
def server():
    with FaultyServer(DATA).running() as running:
        yield running


@pytest.fixture
def waits():
    return []


@pytest.fixture
def open_reader(server, waits):
    readers = []

    def make(etag="one", locate=None, **settings):
        reader = RangeReader(
            "store/model",
            len(DATA),
            locate or (lambda renew: Place(f"{server.url}/model", {"Authorization": "secret"})),
            StoreSettings(**{"remote_timeout_s": 0.3, **settings}),
            RateLimit(0),
            etag=etag,
            wait=waits.append,
            draw=lambda: 1.0,
        )
        readers.append(reader)
        return reader

    yield make
    for reader in readers:
        reader.close()


def read(reader, begin=0, num_bytes=NUM_BYTES):
    target = bytearray(num_bytes)
    reader.read(begin, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("kind", ["206", "exact200", "whole200"])
def test_any_kind_of_range_answer_gives_the_range(server, open_reader, kind):
    server.ranges_as = kind
    reader = open_reader()
    assert read(reader) == DATA
    assert read(reader, 1000, 500_000) == DATA[1000:501_000]
    assert read(reader, len(DATA) - 8, 8) == DATA[-8:]


@pytest.mark.parametrize("fault", [500, 503, 429, "stall", "reset", "short", "wrong_range"])
def test_a_passing_fault_is_retried(server, open_reader, waits, fault):
    server.faults.append(fault)
    assert read(open_reader(), 100, 1_000_000) == DATA[100:1_000_100]
    assert len(server.requests) == 2
    assert waits == [pytest.approx(0.2)]


def test_a_retry_goes_on_where_the_connection_broke(server, open_reader):
    server.faults.append("short")
    assert read(open_reader()) == DATA
    (_, first), (_, second) = server.requests
    assert first["Range"] == f"bytes=0-{len(DATA) - 1}"
    begin, end = second["Range"].removeprefix("bytes=").split("-")
    assert 0 < int(begin) <= len(DATA) // 2
    assert end == str(len(DATA) - 1)


@pytest.mark.parametrize("fault", [500, "reset", "wrong_range", "short"])
def test_a_lasting_fault_ends_in_one_line(server, open_reader, waits, fault):
    server.faults.extend([fault] * 100)
    with pytest.raises(SourceError, match=r"store/model cannot be read, tried 4 times") as caught:
        read(open_reader(remote_retries=3))
    assert "\n" not in caught.value.message
    assert waits == [pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.8)]


def test_the_server_may_ask_for_patience(server, open_reader, waits):
    server.faults.append(lambda handler: handler.answer(503, b"", Retry_After="7"))
    assert read(open_reader()) == DATA
    assert waits == [7.0]


@pytest.mark.parametrize("kind", ["206", "whole200"])
def test_an_object_that_changes_between_ranges_is_an_error(server, open_reader, kind):
    reader = open_reader()
    assert read(reader, 0, 1000) == DATA[:1000]
    server.etag = "two"
    with pytest.raises(CheckpointError, match="store/model changed while it was read"):
        read(reader, 1000, 1000)


def test_a_failed_precondition_says_that_the_object_changed(server, open_reader):
    server.faults.append(412)
    with pytest.raises(CheckpointError, match="changed"):
        read(open_reader())
    assert server.requests[0][1]["If-Match"] == '"one"'


def test_another_length_says_that_the_object_changed(server, open_reader):
    server.data = DATA + b"more"
    with pytest.raises(CheckpointError, match="changed"):
        read(open_reader(), 0, 100)


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "does not exist .404 Oops"), (403, "answers 403 Oops"), (405, "answers 405")],
)
def test_a_refusal_is_not_retried_for_long(server, open_reader, waits, status, reason):
    server.faults.extend([status] * 10)
    with pytest.raises(SourceError, match=reason):
        read(open_reader())
    assert len(server.requests) <= 2
    assert waits == []


def test_a_refused_address_is_made_anew_once(server, open_reader):
    asked = []

    def locate(renew):
        asked.append(renew)
        return Place(f"{server.url}/{len(asked)}", {})

    server.faults.append(403)
    assert read(open_reader(locate=locate)) == DATA
    assert asked == [False, True]


def test_a_file_that_is_shorter_than_the_read_is_refused(open_reader):
    with pytest.raises(CheckpointError):
        read(open_reader(), len(DATA) - 1, 2)


def test_a_compressed_answer_is_refused(server, open_reader):
    server.faults.append(
        lambda handler: handler.answer(200, bytes(100), ETag='"one"', Content_Encoding="gzip")
    )
    with pytest.raises(SourceError, match="compressed"):
        read(open_reader(), 0, 100)


def test_connections_are_kept_and_few(server, open_reader):
    reader = open_reader(remote_connections=3)
    ports = set()
    original = server._server.process_request
    server._server.process_request = lambda request, address: (
        ports.add(address),
        original(request, address),
    )
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        pieces = pool.map(lambda at: read(reader, at, 1000), range(0, 100_000, 1000))
        assert b"".join(pieces) == DATA[:100_000]
    assert 1 <= len(ports) <= 3


def test_a_kept_connection_that_the_server_ended_is_no_failure(server, open_reader, waits):
    reader = open_reader(remote_retries=0)

    def end_after(handler):
        handler.start(206, 0, 9)
        handler.wfile.write(DATA[:10])
        handler.close_connection = True

    server.faults.append(end_after)
    assert read(reader, 0, 10) == DATA[:10]
    assert read(reader, 10, 10) == DATA[10:20]
    assert waits == []


def test_a_redirect_is_remembered_and_gets_no_secrets(server, open_reader):
    with FaultyServer(DATA).running() as other:
        server.faults.append(
            lambda handler: handler.answer(302, b"moved", Location=f"{other.url}/signed?x=1")
        )
        reader = open_reader()
        assert read(reader, 0, 100) == DATA[:100]
        assert read(reader, 100, 100) == DATA[100:200]
        reader.close()
    assert len(server.requests) == 1
    assert [path for path, _ in other.requests] == ["/signed?x=1"] * 2
    assert server.requests[0][1]["Authorization"] == "secret"
    assert all("Authorization" not in headers for _, headers in other.requests)


def test_an_expired_redirect_is_asked_for_again(server, open_reader):
    with FaultyServer(DATA).running() as other:
        for _ in range(2):
            server.faults.append(
                lambda handler: handler.answer(302, b"", Location=f"{other.url}/signed")
            )
        reader = open_reader()
        assert read(reader, 0, 100) == DATA[:100]
        other.faults.append(403)
        assert read(reader, 100, 100) == DATA[100:200]
        reader.close()
    assert len(server.requests) == 2


@pytest.mark.parametrize(
    "location", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "http:// x/"]
)
def test_a_redirect_elsewhere_is_refused(server, open_reader, location):
    server.faults.append(lambda handler: handler.answer(302, b"", Location=location))
    with pytest.raises(SourceError, match="refused"):
        read(open_reader())


def test_redirects_end(server, open_reader):
    server.faults.extend([lambda handler: handler.answer(307, b"", Location="/again")] * 50)
    with pytest.raises(SourceError, match="redirects more than 5 times"):
        read(open_reader())


def test_closing_ends_a_read_soon(server, open_reader):
    reader = open_reader(remote_timeout_s=600)
    server.faults.append("stall")
    asked = threading.Event()
    reader._locate = lambda renew, locate=reader._locate: (asked.set(), locate(renew))[1]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read, reader)
        assert asked.wait(30)
        reader.close()
        with pytest.raises(UnavailableError):
            reading.result(30)
