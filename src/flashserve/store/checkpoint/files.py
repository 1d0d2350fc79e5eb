"""Opens the files of a checkpoint without trusting their names or contents, wherever they are."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import msgspec

from flashserve.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20
MAX_SMALL_BYTES = 64 << 20
"""The largest file besides the weights that is fetched."""
MAX_FILES = 4096

_SMALL_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken")
_SMALL_NAMES = frozenset({"vocab.txt", "merges.txt"})
_SHOWN_CHARACTERS = 120


class CheckpointFiles(Protocol):
    """The files of one checkpoint, by plain name.

    place says in messages where they are. directory is where the small ones (config, tokenizer)
    are on this machine, or will be.
    """

    @property
    def place(self) -> str: ...

    @property
    def directory(self) -> Path: ...

    def names(self) -> tuple[str, ...]:
        """Sorted.

        Raises:
            SourceError: they cannot be listed.
        """

    def open(self, name: str) -> tuple[BinaryIO | io.BufferedReader, int]:
        """A file to be closed by the caller, and how many bytes it has.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: it cannot be read safely.
            SourceError: it cannot be had.
        """


class DirectoryFiles:
    """A checkpoint in a directory of this machine."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.place = str(directory)

    def names(self) -> tuple[str, ...]:
        try:
            return tuple(sorted(path.name for path in self.directory.iterdir()))
        except OSError as error:
            raise CheckpointError(f"{self.place} cannot be read: {one_line(error)}") from None

    def open(self, name: str) -> tuple[BinaryIO, int]:
        file = open_file(self.directory, name)
        return file, os.fstat(file.fileno()).st_size


def is_plain(name: str) -> bool:
    """A name that stays in its directory on any machine, and can be shown."""
    return (
        0 < len(name) <= 255
        and name.isprintable()
        and not name.startswith(".")
        and not any(character in name for character in "/\\\0")
    )


def is_small(name: str) -> bool:
    """A file that belongs to the model besides its weights: configuration, template, tokenizer."""
    return name.endswith(_SMALL_SUFFIXES) or name in _SMALL_NAMES


def shown(name: object) -> str:
    """A name out of a hostile file, fit for a one-line message."""
    text = repr(name)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…'"


def one_line(error: Exception) -> str:
    """An error's text, which may quote a hostile file, fit for a one-line message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 2 * _SHOWN_CHARACTERS else text[: 2 * _SHOWN_CHARACTERS] + "…"


def resolve_file(directory: Path, name: str) -> Path:
    """Where a file of `directory` really is, however its name and links wind.

    A link may lead to another place in the directory, or out of a hub cache's `snapshots/REVISION`
    into its `blobs`, where the cache keeps the files.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the path leaves the directory, or is none.
    """
    try:
        path = (directory / name).resolve(strict=True)
        if not any(path.is_relative_to(root) for root in _roots(directory)):
            raise CheckpointError(f"{shown(name)} in {directory} leads out of the directory")
        return path
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(directory, name, error) from None


def open_file(directory: Path, name: str) -> BinaryIO:
    """Opens a regular file that lies in `directory`; see `resolve_file`.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the path leaves the directory, or it is not a readable regular file.
    """
    path = resolve_file(directory, name)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _unreadable(directory, name, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{directory / name} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_json(
    files: CheckpointFiles, name: str, max_bytes: int = MAX_JSON_BYTES
) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file.

    Raises:
        CheckpointError: the file is too large, not JSON, or not an object.
    """
    path = f"{files.place}/{name}"
    try:
        file, num_bytes = files.open(name)
        with file:
            if num_bytes > max_bytes:
                raise CheckpointError(f"{path} has {num_bytes} bytes; at most {max_bytes} are read")
            value = msgspec.json.decode(file.read(max_bytes))
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {one_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def _roots(directory: Path) -> list[Path]:
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots":
        return [resolved, resolved.parent.parent / "blobs"]
    return [resolved]


def _unreadable(directory: Path, name: str, error: Exception) -> CheckpointError:
    return CheckpointError(f"{shown(name)} in {directory} cannot be read: {one_line(error)}")
