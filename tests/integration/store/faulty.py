"""A small HTTP server with one object, whose next answers a test can spoil."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves `data` at any path. `faults` are taken one by one, each by one request.

    A fault is a function of the handler that answers in place of the server, or a name:
    "stall", "reset", "short", "exact200", "whole200", "wrong_range", or a status number.
    """

    def __init__(self, data: bytes, etag: str = "one") -> None:
        self.data = data
        self.etag = etag
        self.faults: deque[object] = deque()
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.ranges_as: str = "206"
        self.released = threading.Event()
        owner = self

        class Handler(_Handler):
            server_of = owner

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    @contextlib.contextmanager
    def running(self) -> Iterator[FaultyServer]:
        self._thread.start()
        try:
            yield self
        finally:
            self.released.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: FaultyServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        owner = self.server_of
        owner.requests.append((self.path, dict(self.headers)))
        fault = owner.faults.popleft() if owner.faults else None
        first, last = self.wanted()
        if isinstance(fault, Callable):
            fault(self)
        elif isinstance(fault, int):
            self.answer(fault, b"<Error><Code>Oops</Code></Error>")
        elif fault == "stall":
            self.start(206, first, last)
            self.wfile.write(owner.data[first : first + 10])
            self.wfile.flush()
            owner.released.wait()
            self.close_connection = True
        elif fault == "reset":
            self.start(206, first, last)
            self.wfile.write(owner.data[first : (first + last) // 2])
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            self.connection.close()
            self.close_connection = True
        elif fault == "short":
            self.start(206, first, last)
            self.wfile.write(owner.data[first : (first + last) // 2])
            self.close_connection = True
        elif fault == "wrong_range":
            self.start(206, first + 1, last + 1, length=last + 1 - first)
            self.wfile.write(owner.data[first + 1 : last + 2])
        elif (fault or owner.ranges_as) == "exact200":
            self.answer(200, owner.data[first : last + 1])
        elif (fault or owner.ranges_as) == "whole200":
            self.answer(200, owner.data)
        else:
            self.start(206, first, last)
            self.wfile.write(owner.data[first : last + 1])

    def wanted(self) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        assert match, self.headers.get("Range")
        return int(match[1]), int(match[2])

    def start(self, status: int, first: int, last: int, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.server_of.data)}")
        self.send_header("Content-Length", str(last - first + 1 if length is None else length))
        self.send_header("ETag", f'"{self.server_of.etag}"')
        self.end_headers()

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)
