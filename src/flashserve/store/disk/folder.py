"""A directory of the disk tier, held by descriptor: plain names, no links followed, private."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from flashserve.errors import CheckpointError, InputError, UnavailableError
from flashserve.store.checkpoint.files import one_line, shown

MAX_NAME = 200
_PLAIN = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_TEMPORARY = ".tmp-"


def check_plain(name: str) -> None:
    """A file's name out of a listing becomes a file's name of ours only if it is a plain one.

    What begins with a dot is ours alone, so that no listed file can pass for a manifest.

    Raises:
        CheckpointError: it is not made of letters, digits, `.`, `_` and `-`, begins with a dot, or
            is too long.
    """
    if not _PLAIN.fullmatch(name):
        raise CheckpointError(
            f"file name {shown(name)} is not kept on disk: only letters, digits, '.', '_' and '-' "
            f"are, not beginning with '.', at most {MAX_NAME}"
        )


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
    """Turns what the kernel says of a file of the disk tier into one clear line.

    Raises:
        UnavailableError: the disk is full, or a file cannot be read or written.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UnavailableError(
                f"the disk tier is full: {root} takes no more bytes ({error.strerror}); free "
                "space there or lower store.disk_bytes"
            ) from None
        raise UnavailableError(f"the disk tier {root} cannot be used: {one_line(error)}") from None


class Folder:
    """An open directory. Every method raises OSError; a link in the place of a file is one."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.fd = fd

    @classmethod
    def make_root(cls, path: Path) -> Folder:
        """Opens `path`, which is made if need be and is private to this user from here on.

        Raises:
            InputError: it is a link, or another user's.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
        try:
            folder = cls(path, os.open(path, _DIRECTORY))
        except NotADirectoryError:
            raise InputError(
                f"{path} is a link or no directory: name the directory itself (data_dir)"
            ) from None
        facts = os.fstat(folder.fd)
        if facts.st_uid != os.geteuid():
            folder.close()
            raise InputError(f"directory {path} belongs to another user (data_dir)")
        if stat.S_IMODE(facts.st_mode) != 0o700:
            os.fchmod(folder.fd, 0o700)
        return folder

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Folder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def child(self, name: str, *, make: bool = False) -> Folder:
        if make:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o700, dir_fd=self.fd)
        return Folder(self.path / name, os.open(name, _DIRECTORY, dir_fd=self.fd))

    def open(self, name: str, flags: int) -> int:
        """A descriptor of the regular file `name`; whoever asked closes it."""
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=self.fd)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(self.path / name))
        return fd

    def read(self, name: str, max_bytes: int) -> bytes:
        """The whole file; one that is larger is an OSError."""
        fd = self.open(name, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise OSError(errno.EFBIG, "larger than it may be", str(self.path / name))
        return data

    def write(self, name: str, data: bytes | memoryview, *, sync: bool = True) -> None:
        """Puts a file in place whole: a reader sees the old one or the new one."""
        temporary = temporary_name()
        fd = self.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                if sync:
                    os.fsync(fd)
            self.rename(temporary, self, name)
        except BaseException:
            self.remove(temporary)
            raise
        if sync:
            self.sync()

    def names(self) -> list[str]:
        with os.scandir(self.fd) as entries:
            return sorted(entry.name for entry in entries)

    def facts(self, name: str) -> os.stat_result | None:
        """Of the entry itself, not of what a link leads to; None where there is none."""
        try:
            return os.stat(name, dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return None

    def rename(self, name: str, to: Folder, new_name: str) -> None:
        os.rename(name, new_name, src_dir_fd=self.fd, dst_dir_fd=to.fd)

    def link(self, name: str, to: Folder, new_name: str) -> None:
        """Gives the file a further name; what had that name before is replaced at once."""
        temporary = temporary_name()
        os.link(name, temporary, src_dir_fd=self.fd, dst_dir_fd=to.fd, follow_symlinks=False)
        to.rename(temporary, to, new_name)
        # Renaming onto a name of the same file does nothing, and leaves both.
        to.remove(temporary)

    def remove(self, name: str) -> None:
        """Removes a file or link; none is fine."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def remove_any(self, name: str) -> None:
        """Removes whatever `name` is, with all below it; links are not followed."""
        facts = self.facts(name)
        if facts is not None and stat.S_ISDIR(facts.st_mode):
            shutil.rmtree(name, dir_fd=self.fd)
        else:
            self.remove(name)

    def touch(self, name: str, seconds: float) -> None:
        os.utime(name, (seconds, seconds), dir_fd=self.fd, follow_symlinks=False)

    def sync(self) -> None:
        os.fsync(self.fd)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def temporary_name() -> str:
    return f"{_TEMPORARY}{secrets.token_hex(8)}"


def is_temporary(name: str) -> bool:
    """Left by a process that died while it wrote."""
    return name.startswith(_TEMPORARY)
