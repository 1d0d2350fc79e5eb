"""Opens the files of a checkpoint directory without trusting their names or contents."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from flashserve.errors import CheckpointError

MAX_JSON_BYTES = 16 << 20
_SHOWN_CHARACTERS = 120


def shown(name: object) -> str:
    """A name out of a hostile file, fit for a one-line message."""
    text = repr(name)
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + "…'"


def one_line(error: Exception) -> str:
    """An error's text, which may quote a hostile file, fit for a one-line message."""
    text = " ".join(str(error).split())
    return text if len(text) <= 2 * _SHOWN_CHARACTERS else text[: 2 * _SHOWN_CHARACTERS] + "…"


def open_file(directory: Path, name: str) -> BinaryIO:
    """Opens a regular file that lies in `directory`, however its name and links wind.

    A link may lead to another place in the directory, or out of a hub cache's `snapshots/REVISION`
    into its `blobs`, where the cache keeps the files.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the path leaves the directory, or it is not a readable regular file.
    """
    try:
        path = (directory / name).resolve(strict=True)
        if not any(path.is_relative_to(root) for root in _roots(directory)):
            raise CheckpointError(f"{shown(name)} in {directory} leads out of the directory")
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{shown(name)} in {directory} cannot be read: {one_line(error)}"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointError(f"{directory / name} is not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def _roots(directory: Path) -> list[Path]:
    resolved = directory.resolve()
    if resolved.parent.name == "snapshots":
        return [resolved, resolved.parent.parent / "blobs"]
    return [resolved]


def read_json(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any] | None:
    """The JSON object in a file, or None where there is no such file.

    Raises:
        CheckpointError: the file is too large, not JSON, or not an object.
    """
    try:
        with open_file(directory, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CheckpointError(
                    f"{directory / name} has {size} bytes; at most {max_bytes} are read"
                )
            value = msgspec.json.decode(file.read(max_bytes))
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{directory / name} is not JSON: {one_line(error)}") from None
    except OSError as error:
        raise CheckpointError(f"{directory / name} cannot be read: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{directory / name} holds no JSON object")
    return value
