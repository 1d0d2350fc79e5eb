"""Reads ranges of a remote file over HTTP straight into the caller's memory."""

from __future__ import annotations

import http.client
import random
import re
import ssl
import threading
from collections.abc import Callable

from flashserve.config import StoreSettings
from flashserve.errors import (
    CheckpointError,
    SourceError,
    SourceUnavailableError,
    UnavailableError,
)
from flashserve.store.checkpoint.files import one_line
from flashserve.store.sources.connections import Answer, Place, Pool, finishing, host_of
from flashserve.store.sources.rate import RateLimit

Locate = Callable[[bool], Place]
"""Where a file is just now. With True, a place made anew: the one given before was refused."""

PREFERRED_BYTES = 16 << 20
MAX_SKIPPED_BYTES = 256 << 20
"""A server that sends whole files in place of ranges is endured this far into a file."""
_PIECE_BYTES = 256 << 10
"""Counted at once: a connection that fails costs at most so many bytes that had come."""
_FIRST_DELAY_S = 0.2
_MAX_DELAY_S = 20.0
_MAX_RETRY_AFTER_S = 60.0

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_STALE = {400, 401, 403}
_BUSY = {408, 425, 429, 500, 502, 503, 504}


class RangeReader:
    """One remote file. Thread-safe; `close` ends reads under way with an UnavailableError."""

    preferred_bytes = PREFERRED_BYTES

    def __init__(
        self,
        name: str,
        num_bytes: int,
        locate: Locate,
        settings: StoreSettings,
        limit: RateLimit,
        *,
        etag: str | None = None,
        ca_bundle: str | None = None,
        wait: Callable[[float], object] | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """Connects to nothing yet.

        Args:
            name: of the file, in messages.
            num_bytes: as listed.
            locate: where it is; asked before each request unless a redirect is remembered.
            settings: connections, timeout, retries.
            limit: on bytes, shared with other readers.
            etag: as listed, without quotes; None where the place itself names the version.
            ca_bundle: a file of certificates to trust in place of the system's.
            wait: sleeps between attempts; by default until the time is over or `close`.
            draw: a number in [0, 1), for jitter.
        """
        self.preferred_threads = settings.remote_connections
        self._name = name
        self._num_bytes = num_bytes
        self._locate = locate
        self._limit = limit
        self._etag = etag
        self._retries = settings.remote_retries
        self._pool = Pool(settings.remote_timeout_s, ca_bundle)
        self._slots = threading.Semaphore(settings.remote_connections)
        self._closed = threading.Event()
        self._wait = wait or self._closed.wait
        self._draw = draw
        self._redirected: Place | None = None

    def read(self, begin: int, target: memoryview) -> None:
        """See FileReader."""
        if begin + len(target) > self._num_bytes:
            raise CheckpointError(f"{self._name} ends at byte {self._num_bytes}")
        transfer = _Transfer(begin, target)
        with self._slots:
            num_failures, is_renewed = 0, False
            while transfer.num_left:
                if self._closed.is_set():
                    raise UnavailableError("the store is closing")
                try:
                    self._attempt(transfer, renew=is_renewed)
                except _StaleError as error:
                    if is_renewed:
                        raise SourceError(str(error)) from None
                    is_renewed, self._redirected = True, None
                except ssl.SSLCertVerificationError as error:
                    raise SourceError(f"{self._name} cannot be read: {one_line(error)}") from None
                except (_FailedError, OSError, http.client.HTTPException) as error:
                    num_failures += 1
                    self._redirected = None
                    self._back_off(num_failures, error)

    def close(self) -> None:
        self._closed.set()
        self._pool.close()

    def _back_off(self, num_failures: int, error: Exception) -> None:
        if self._closed.is_set():
            raise UnavailableError("the store is closing") from None
        if num_failures > self._retries:
            what = one_line(error) or type(error).__name__
            raise SourceUnavailableError(
                f"{self._name} cannot be read, tried {num_failures} times: {what}"
            ) from None
        delay = min(_FIRST_DELAY_S * 2 ** (num_failures - 1), _MAX_DELAY_S)
        delay *= 0.5 + self._draw() / 2
        if isinstance(error, _FailedError):
            delay = max(delay, min(error.retry_after_s, _MAX_RETRY_AFTER_S))
        self._wait(delay)

    def _attempt(self, transfer: _Transfer, *, renew: bool) -> None:
        """Moves as many bytes as one request brings."""
        asked = None if renew else self._redirected
        asked = asked or self._locate(renew)
        headers = {"Range": f"bytes={transfer.position}-{transfer.end - 1}"}
        if self._etag:
            headers["If-Match"] = f'"{self._etag}"'
        answer, place = self._pool.get(asked, headers)
        with finishing(answer):
            self._check_status(answer, place)
            self._check_version(answer)
            num_skipped = self._num_before(answer, transfer)
            self._redirected = place if place.url != asked.url else self._redirected
            transfer.skip(answer, num_skipped, self._limit)
            transfer.receive(answer, self._limit)

    def _check_status(self, answer: Answer, place: Place) -> None:
        status = answer.status
        if status in {200, 206}:
            return
        reason = _reason(answer)
        if status == 412:
            raise self._changed()
        if status == 416:
            raise CheckpointError(f"{self._name} is shorter than when it was listed")
        if status in _BUSY:
            raise _FailedError(f"{host_of(place.url)} answers {reason}", _retry_after_s(answer))
        if status in {404, 410}:
            raise SourceError(f"{self._name} does not exist ({reason})")
        message = f"{self._name} cannot be read: {host_of(place.url)} answers {reason}"
        raise _StaleError(message) if status in _STALE else SourceError(message)

    def _check_version(self, answer: Answer) -> None:
        etag = answer.headers.get("ETag")
        if self._etag and etag and _bare(etag) != self._etag:
            raise self._changed()
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise SourceError(f"{self._name} is sent compressed, though it was not asked for so")

    def _num_before(self, answer: Answer, transfer: _Transfer) -> int:
        """How many bytes come before the wanted ones: 0, unless the whole file is sent."""
        length = _content_length(answer)
        if answer.status == 206 or "Content-Range" in answer.headers:
            self._check_range(answer, transfer, length)
            return 0
        if length is None or length == self._num_bytes:
            if transfer.position > MAX_SKIPPED_BYTES:
                raise SourceError(
                    f"{self._name} cannot be read: the server sends whole files, not ranges"
                )
            return transfer.position
        if length != transfer.num_left:
            raise _FailedError(f"{length} bytes came where {transfer.num_left} were asked for")
        return 0  # some servers answer a range with 200 and exactly its bytes

    def _check_range(self, answer: Answer, transfer: _Transfer, length: int | None) -> None:
        value = answer.headers.get("Content-Range", "none")
        match = _CONTENT_RANGE.fullmatch(value.strip())
        if match is None:
            raise _FailedError(f"a range came with Content-Range {value[:80]!r}")
        first, last = int(match[1]), int(match[2])
        if match[3] != "*" and int(match[3]) != self._num_bytes:
            raise self._changed()
        is_within = first == transfer.position and first <= last < transfer.end
        if not is_within or length not in {None, last - first + 1}:
            raise _FailedError(
                f"bytes {first} to {last} came, where {transfer.position} to {transfer.end - 1} "
                "were asked for"
            )

    def _changed(self) -> CheckpointError:
        return CheckpointError(f"{self._name} changed while it was read: deploy or stage it again")


class _Transfer:
    """A range on its way into memory; what has come stays when a connection fails."""

    def __init__(self, begin: int, target: memoryview) -> None:
        self.position = begin
        self.end = begin + len(target)
        self._target = target

    @property
    def num_left(self) -> int:
        return self.end - self.position

    def skip(self, answer: Answer, num_bytes: int, limit: RateLimit) -> None:
        scratch = memoryview(bytearray(min(num_bytes, _PIECE_BYTES)))
        while num_bytes:
            with scratch[: min(num_bytes, _PIECE_BYTES)] as piece:
                num_bytes -= _receive(answer, piece, limit)

    def receive(self, answer: Answer, limit: RateLimit) -> None:
        while self.num_left:
            start = len(self._target) - self.num_left
            with self._target[start : start + _PIECE_BYTES] as piece:
                self.position += _receive(answer, piece, limit)


class _FailedError(Exception):
    """One attempt failed; another may succeed."""

    def __init__(self, message: str, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class _StaleError(Exception):
    """Refused, perhaps because the address or the token is too old."""


def _receive(answer: Answer, piece: memoryview, limit: RateLimit) -> int:
    limit.take(len(piece))
    count = answer.read_into(piece)
    if not count:
        raise _FailedError("the answer ended before its time")
    return count


def _content_length(answer: Answer) -> int | None:
    value = answer.headers.get("Content-Length", "")
    return int(value) if re.fullmatch(r"\d{1,19}", value) else None


def _retry_after_s(answer: Answer) -> float:
    value = answer.headers.get("Retry-After", "").strip()
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def _reason(answer: Answer) -> str:
    """The status, and the code that S3 puts into the body."""
    match = re.search(r"<Code>(\w{1,64})</Code>", answer.read_error())
    return f"{answer.status} {match[1]}" if match else str(answer.status)


def _bare(etag: str) -> str:
    return etag.strip().removeprefix("W/").strip('"')
