"""What lies between a client and an object store: a proxy that counts, and harms what passes."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.client
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

_PIECE_BYTES = 64 << 10
_HOPS = {"Content-Length", "Connection", "Transfer-Encoding", "Date"}


@dataclasses.dataclass(slots=True)
class Reply:
    """What the store answered and has not been sent yet; a fault may change it.

    Names of headers are in title case. first is the position of the body in its object. `pause` is
    called before each piece of the body. After `cut_at` bytes of it the connection ends, as `cut`
    says.
    """

    path: str
    status: int
    headers: dict[str, str]
    body: bytearray
    first: int
    length: str
    pause: Callable[[], object] = lambda: None
    cut_at: int | None = None
    cut: Literal["close", "reset", "stall"] = "close"

    def replace(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Another answer in place of this one."""
        self.status, self.body, self.length = status, bytearray(body), str(len(body))
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


Fault = Callable[[Reply], None]


class Transit:
    """A proxy in front of the store at `upstream`; signatures stay valid.

    A fault of `harming` changes answers: those to reads of weights, and those to all other
    questions. num_sent counts bytes of weights that went out; positions are those in their object
    at which they began.
    """

    def __init__(self, upstream: str) -> None:
        self.num_sent = 0
        self.positions: list[int] = []
        self.released = threading.Event()
        self.faults: tuple[Fault | None, Fault | None] = (None, None)
        self._upstream = urllib.parse.urlsplit(upstream).netloc
        self._lock = threading.Lock()
        owner = self

        class Handler(_Handler):
            transit = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False  # a killed client leaves kept connections behind
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @contextlib.contextmanager
    def running(self) -> Iterator[Transit]:
        thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            thread.join()
            self._server.server_close()

    @contextlib.contextmanager
    def harming(
        self, *, weights: Fault | None = None, questions: Fault | None = None
    ) -> Iterator[None]:
        """Whoever waits for `released` goes on afterwards."""
        self.released.clear()
        self.faults = (weights, questions)
        try:
            yield
        finally:
            self.faults = (None, None)
            self.released.set()

    def ask(self, method: str, path: str, headers: dict[str, str]) -> Reply:
        """What the store itself answers."""
        connection = http.client.HTTPConnection(self._upstream, timeout=30)
        try:
            connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            body = bytearray(answer.read())
            kept = {name.title(): value for name, value in answer.getheaders()}
            for name in _HOPS & kept.keys():
                del kept[name]
            length = str(len(body))
            if method == "HEAD":
                length = answer.getheader("Content-Length", length)
        finally:
            connection.close()
        match = re.match(r"bytes (\d+)-", kept.get("Content-Range", ""))
        return Reply(path, answer.status, kept, body, int(match[1]) if match else 0, length)

    def count(self, num_bytes: int) -> None:
        with self._lock:
            self.num_sent += num_bytes


def flip(*positions: int) -> Fault:
    """Changes one bit at each of these positions of the object, whenever it passes."""

    def fault(reply: Reply) -> None:
        for position in positions:
            if 0 <= position - reply.first < len(reply.body):
                reply.body[position - reply.first] ^= 0x40

    return fault


def once_each(*faults: Fault) -> Fault:
    """The faults one by one, for as many answers; then none."""
    left = collections.deque(faults)

    def next_fault(reply: Reply) -> None:
        with contextlib.suppress(IndexError):
            left.popleft()(reply)

    return next_fault


def cut(how: Literal["close", "reset", "stall"]) -> Fault:
    """Half of the body comes, and then no more."""

    def fault(reply: Reply) -> None:
        reply.cut_at, reply.cut = len(reply.body) // 2, how

    return fault


def busy(status: int) -> Fault:
    """The store asks for patience."""
    body = b"<Error><Code>SlowDown</Code></Error>"
    return lambda reply: reply.replace(status, body, Retry_After="1")


def without_md5(reply: Reply) -> None:
    """An ETag as of an object that came in parts: it promises nothing of the bytes."""
    if etag := reply.headers.get("Etag"):
        reply.headers["Etag"] = f'{etag[:-1]}-2"'
    if b"<Contents>" in reply.body:
        reply.body[:] = re.sub(rb"(<ETag>[^<]*[0-9a-f]{32})", rb"\1-2", bytes(reply.body))
        assert b"-2" in reply.body
        reply.length = str(len(reply.body))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    transit: Transit

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        reply = self.transit.ask(self.command, self.path, dict(self.headers))
        is_weights = ".safetensors" in self.path and len(reply.body) > _PIECE_BYTES
        of_weights, of_questions = self.transit.faults
        if is_weights:
            self.transit.positions.append(reply.first)
        if fault := of_weights if is_weights else of_questions:
            fault(reply)
        with contextlib.suppress(ConnectionError):
            self._send(reply, is_weights=is_weights)

    def _send(self, reply: Reply, *, is_weights: bool) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", reply.length)
        self.end_headers()
        end = len(reply.body) if reply.cut_at is None else min(reply.cut_at, len(reply.body))
        for begin in range(0, end, _PIECE_BYTES):
            reply.pause()
            piece = reply.body[begin : min(begin + _PIECE_BYTES, end)]
            self.wfile.write(piece)
            if is_weights:
                self.transit.count(len(piece))
        if end < len(reply.body):
            if reply.cut == "stall":
                self.transit.released.wait()
            if reply.cut == "reset":
                linger = b"\1\0\0\0\0\0\0\0"
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            self.close_connection = True
