"""Private Unix sockets: one server per path, only its own user may connect."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import pathlib
import socket
import stat

from flashserve.errors import ConflictError, InputError

_MAX_PATH_BYTES = 107  # sun_path holds 108 with its final zero


@dataclasses.dataclass(frozen=True, slots=True)
class UnixListener:
    """A listening socket and the lock that makes its path ours; `close` gives both back."""

    socket: socket.socket
    path: pathlib.Path
    lock_fd: int

    def close(self) -> None:
        """Removes the path while the lock is still held, so that no successor's is removed."""
        self.path.unlink(missing_ok=True)
        self.socket.close()
        os.close(self.lock_fd)


def bind_unix_socket(path: pathlib.Path) -> UnixListener:
    """Listens on `path` (0600, its directory 0700); a path that a dead server left is replaced.

    Raises:
        ConflictError: another live server holds the path; names its process id.
        InputError: the path is too long, or its directory is open to other users.
    """
    if len(os.fsencode(path)) > _MAX_PATH_BYTES:
        raise InputError(
            f"socket path {path} is longer than {_MAX_PATH_BYTES} bytes; use a shorter data_dir"
        )
    _private_directory(path.parent)
    lock_fd = _lock(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        os.close(lock_fd)
        raise InputError(f"cannot listen on {path}: {error.strerror}") from None
    return UnixListener(listener, path, lock_fd)


def _private_directory(directory: pathlib.Path) -> None:
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    facts = directory.stat()
    if facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
        raise InputError(
            f"directory {directory} of the socket is open to other users; run: "
            f"chmod 700 {directory}"
        )


def _lock(path: pathlib.Path) -> int:
    """The descriptor that holds the lock. The file stays: removing it would race."""
    lock_fd = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(lock_fd, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock_fd)
        raise ConflictError(
            f"another server (process {owner}) is already serving {path}; stop it first"
        ) from None
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, f"{os.getpid()}\n".encode(), 0)
    return lock_fd
