"""The worker's end of its connection: polled between engine steps, never blocking a send."""

from __future__ import annotations

import select
import socket

from flashserve.messages import wire
from flashserve.messages.wire import Frame

_RECV_BYTES = 256 << 10


class Link:
    """Frames over a stream socket, in one thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = wire.FrameDecoder()
        self._out = bytearray()
        self._poller = select.poll()
        self._poller.register(sock, select.POLLIN)

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
        wanted = select.POLLIN | (select.POLLOUT if self._out else 0)
        self._poller.modify(self._sock, wanted)

    def poll(self, timeout_s: float | None) -> list[Frame]:
        """The frames that are there, after waiting up to timeout_s (None: until something comes).

        May return none before the time is up.

        Raises:
            ConnectionError: the peer is gone.
            WireError: the peer sent something that is no frame.
        """
        self.flush()
        events = self._poller.poll(None if timeout_s is None else timeout_s * 1000)
        if not any(mask & ~select.POLLOUT for _, mask in events):
            return []
        try:
            data = self._sock.recv(_RECV_BYTES)
        except BlockingIOError:
            return []
        if not data:
            raise ConnectionResetError("the parent closed the connection")
        return self._decoder.feed(data)
