"""HTTP/1.1 connections that are kept, and one answer at a time on each: no retries, no policy."""

from __future__ import annotations

import collections
import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from flashserve.errors import SourceError
from flashserve.store.checkpoint.files import one_line, shown

MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}
_SECRETS = {"authorization", "cookie"}


class Place(NamedTuple):
    """A URL, and the headers that go with a request to it."""

    url: str
    headers: Mapping[str, str]


class Answer:
    """A response whose body is yet to be read, and the connection it comes on."""

    def __init__(self, connection: Connection, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self._connection = connection
        self._response = response

    def read_into(self, target: memoryview) -> int:
        """Fills as much of `target` as the body still has; 0 at its end.

        Raises:
            OSError, http.client.HTTPException: the connection failed.
        """
        return self._response.readinto(target)

    def read_error(self, max_bytes: int = 4096) -> str:
        return self._response.read(max_bytes).decode("utf-8", "replace")

    def finish(self) -> None:
        """Keeps the connection when the whole body was read, else closes it."""
        if self._response.isclosed() or self._response.length == 0:
            self._response.close()
            self._connection.release()
        else:
            self._connection.drop()


class Connection:
    """One connection to one host, out of a pool to which it returns."""

    def __init__(self, pool: Pool, key: tuple[str, str], timeout_s: float) -> None:
        scheme, host = key
        self.key = key
        self.was_used = False
        self._pool = pool
        self._socket: socket.socket | None = None
        if scheme == "https":
            self._http: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, timeout=timeout_s, context=pool.tls()
            )
        else:
            self._http = http.client.HTTPConnection(host, timeout=timeout_s)

    def get(self, target: str, headers: Mapping[str, str]) -> Answer:
        """Asks, and returns when the answer's headers have come.

        Raises:
            OSError, http.client.HTTPException: no answer came.
        """
        if self._http.sock is None:
            self._http.connect()
            self._socket = self._http.sock
            self._pool.check_open()
        self._http.request("GET", target, headers=dict(headers))
        return Answer(self, self._http.getresponse())

    def release(self) -> None:
        self.was_used = True
        self._pool.give_back(self)

    def drop(self) -> None:
        self._pool.forget(self)
        self._http.close()

    def interrupt(self) -> None:
        """From another thread: whoever reads from it fails at once."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)


class Pool:
    """Connections of one reader, as many as its threads use at once. Thread-safe.

    Args:
        ca_bundle: a file of certificates to trust in place of the system's.
    """

    def __init__(self, timeout_s: float, ca_bundle: str | None = None) -> None:
        self._timeout_s = timeout_s
        self._ca_bundle = ca_bundle
        self._lock = threading.Lock()
        self._idle: dict[tuple[str, str], list[Connection]] = collections.defaultdict(list)
        self._busy: set[Connection] = set()
        self._tls: ssl.SSLContext | None = None
        self._is_closed = False

    def tls(self) -> ssl.SSLContext:
        """Called under the lock, while a connection is made.

        Raises:
            SourceError: the file of certificates cannot be used.
        """
        if self._tls is None:
            try:
                self._tls = ssl.create_default_context(cafile=self._ca_bundle)
            except OSError as error:
                raise SourceError(
                    f"the certificates in {self._ca_bundle} cannot be used: {one_line(error)}"
                ) from None
        return self._tls

    def get(self, place: Place, headers: Mapping[str, str]) -> tuple[Answer, Place]:
        """The answer to a GET, and the place that gave it after redirects.

        Raises:
            SourceError: the address, or one that it redirects to, is not acceptable.
            OSError, http.client.HTTPException: the connection failed.
        """
        for _ in range(MAX_REDIRECTS + 1):
            answer = self._get_once(place, headers)
            location = answer.headers.get("Location")
            if answer.status not in _REDIRECTS or location is None:
                return answer, place
            answer.finish()
            place = _redirected(place, location)
        raise SourceError(f"{host_of(place.url)} redirects more than {MAX_REDIRECTS} times")

    def _get_once(self, place: Place, headers: Mapping[str, str]) -> Answer:
        parts = urllib.parse.urlsplit(place.url)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        key = (parts.scheme, parts.netloc.rpartition("@")[2])
        while True:
            connection = self._take(key)
            try:
                return connection.get(target, {**place.headers, **headers})
            except (ConnectionError, http.client.BadStatusLine):
                connection.drop()
                # The server may have ended a kept connection at any time: that is no failure.
                if not connection.was_used:
                    raise
            except BaseException:
                connection.drop()
                raise

    def _take(self, key: tuple[str, str]) -> Connection:
        with self._lock:
            self.check_open()
            idle = self._idle[key]
            connection = idle.pop() if idle else Connection(self, key, self._timeout_s)
            self._busy.add(connection)
            return connection

    def check_open(self) -> None:
        if self._is_closed:
            raise ConnectionAbortedError("the reader was closed")

    def give_back(self, connection: Connection) -> None:
        with self._lock:
            self._busy.discard(connection)
            if not self._is_closed:
                self._idle[connection.key].append(connection)
                return
        connection.drop()

    def forget(self, connection: Connection) -> None:
        with self._lock:
            self._busy.discard(connection)

    def close(self) -> None:
        """Closes the idle connections; those in use fail at once and close themselves."""
        with self._lock:
            self._is_closed = True
            idle = [connection for kept in self._idle.values() for connection in kept]
            self._idle.clear()
            for connection in self._busy:
                connection.interrupt()
        for connection in idle:
            connection.drop()


@contextlib.contextmanager
def finishing(answer: Answer) -> Iterator[Answer]:
    """Whatever happens to an answer, its connection is given back or closed."""
    try:
        yield answer
    finally:
        answer.finish()


def host_of(url: str) -> str:
    """Host and port, fit for a message: a URL's path and query may hold secrets."""
    return shown(urllib.parse.urlsplit(url).netloc.rpartition("@")[2])


def _redirected(place: Place, location: str) -> Place:
    """Where a redirect leads; secrets stay with the host for which they were meant."""
    try:
        url = urllib.parse.urljoin(place.url, location)
        old, new = urllib.parse.urlsplit(place.url), urllib.parse.urlsplit(url)
        is_fine = new.scheme in {"https", old.scheme} and new.hostname and url.isascii()
    except ValueError:
        is_fine = False
    if not is_fine or any(character <= " " for character in url):
        raise SourceError(f"{host_of(place.url)} redirects to {shown(location)}: refused")
    if _is_inside(new.hostname) and not _is_inside(old.hostname):
        raise SourceError(f"{host_of(place.url)} redirects to a private address: refused")
    if (new.scheme, new.netloc) == (old.scheme, old.netloc):
        return Place(url, place.headers)
    kept = {name: each for name, each in place.headers.items() if name.lower() not in _SECRETS}
    return Place(url, kept)


def _is_inside(host: str | None) -> bool:
    """An address literal, or a name, of this machine or a private network."""
    try:
        return not ipaddress.ip_address(host or "").is_global
    except ValueError:
        return host == "localhost"


def is_protected(url: str) -> bool:
    """Whether nobody on the way can change what is read: TLS, or no way beyond this machine."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "https":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"
