"""Asks the node of this machine for a model, from any process of the same user."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from flashserve.errors import UnavailableError, WireError, error_from_code
from flashserve.messages import wire
from flashserve.messages.handout import METHOD, HandoutGrant, HandoutRequest
from flashserve.store.checkpoint.files import one_line
from flashserve.store.handout.copies import ModelCopy

SOCKET_NAME = "store.sock"
_RECV_BYTES = 256 << 10


def socket_path(data_dir: Path) -> Path:
    """Where the node of a data directory listens."""
    return data_dir / "run" / SOCKET_NAME


def fetch(path: Path, source: str) -> tuple[ModelCopy, socket.socket] | None:
    """A model of the node that listens on `path`, and the connection that keeps it; None: no node.

    Waits as long as the node takes to bring the model into memory.

    Raises:
        FlashServeError: what the node answered; one line.
        UnavailableError: the node ended meanwhile, or may not be asked.
    """
    if not path.exists():
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            return None
        sock.sendall(wire.encode(wire.Call(0, METHOD, wire.pack(HandoutRequest(source)))))
        return _receive(sock), sock
    except OSError as error:
        sock.close()
        raise UnavailableError(f"the node at {path} does not answer: {one_line(error)}") from None
    except BaseException:
        sock.close()
        raise


def _receive(sock: socket.socket) -> ModelCopy:
    decoder, fds = wire.FrameDecoder(), list[int]()
    try:
        while True:
            data, received, _, _ = socket.recv_fds(sock, _RECV_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            fds += received
            if not data:
                raise ConnectionResetError("it ended before its answer")
            for frame in decoder.feed(data):
                return _copy(frame, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def _copy(frame: wire.Frame, fds: list[int]) -> ModelCopy:
    if isinstance(frame, wire.Fault):
        raise error_from_code(frame.code, frame.message)
    if not isinstance(frame, wire.Reply) or len(fds) != 1:
        raise WireError("the node answered something else than a model")
    return ModelCopy(fds[0], wire.unpack(frame.body, HandoutGrant))
