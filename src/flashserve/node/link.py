"""The worker's end of its connection: read by a thread of its own, never blocking a send."""

from __future__ import annotations

import collections
import os
import select
import socket
import threading
from collections.abc import Callable

from flashserve.errors import FlashServeError
from flashserve.messages import wire
from flashserve.messages.wire import Frame

_RECV_BYTES = 256 << 10


class Link:
    """Frames over a stream socket. One thread sends and polls; another one, of ours, receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._out = bytearray()
        self._received: collections.deque[Frame | Exception] = collections.deque()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poller = select.poll()
        self._poller.register(self._wake_fd, select.POLLIN)

    def listen(self, on_frame: Callable[[Frame], None], on_end: Callable[[], None]) -> None:
        """Starts to receive. `on_frame` sees each frame on the receiving thread, before `poll`
        returns it, and while the other thread may be busy for long; `on_end` is called there when
        no more will come.
        """
        threading.Thread(target=self._receive, args=(on_frame, on_end), daemon=True).start()

    def send(self, frame: Frame) -> None:
        """Queues a frame; it leaves with the next `flush` or `poll`."""
        self._out += wire.encode(frame)

    def flush(self) -> None:
        """Writes what the socket takes now; the rest leaves from `poll`.

        Raises:
            ConnectionError: the peer is gone.
        """
        while self._out:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                break
            del self._out[:sent]

    def poll(self, timeout_s: float | None) -> list[Frame]:
        """The frames that are there, after waiting up to timeout_s (None: until something comes).

        May return none before the time is up.

        Raises:
            ConnectionError: the peer is gone.
            WireError: the peer sent something that is no frame.
        """
        self.flush()
        if self._out:
            self._poller.register(self._sock, select.POLLOUT)
        try:
            events = self._poller.poll(None if timeout_s is None else timeout_s * 1000)
        finally:
            if self._out:
                self._poller.unregister(self._sock)
        if any(fd == self._wake_fd for fd, _ in events):
            os.eventfd_read(self._wake_fd)
        frames: list[Frame] = []
        while self._received:
            received = self._received.popleft()
            if isinstance(received, Exception):
                raise received
            frames.append(received)
        return frames

    def _receive(self, on_frame: Callable[[Frame], None], on_end: Callable[[], None]) -> None:
        """Ends with the connection, whose end `poll` then raises."""
        decoder = wire.FrameDecoder()
        readable = select.poll()
        readable.register(self._sock, select.POLLIN)
        try:
            while True:
                readable.poll()
                data = self._sock.recv(_RECV_BYTES)
                if not data:
                    raise ConnectionResetError("the parent closed the connection")
                for frame in decoder.feed(data):
                    on_frame(frame)
                    self._put(frame)
        except (OSError, FlashServeError) as error:
            self._put(error)
        finally:
            on_end()

    def _put(self, received: Frame | Exception) -> None:
        self._received.append(received)
        os.eventfd_write(self._wake_fd, 1)
