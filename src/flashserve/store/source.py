"""Where checkpoints come from: a source's address, its identity, and its files on this machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import xxhash

from flashserve.errors import ForbiddenError, SourceError
from flashserve.store.files import one_line, shown
from flashserve.types import Tier

DEMO_NAME = "smollm2"

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(demo|s3|hf):")
_PARTS = (".safetensors", ".json", ".jinja")
_NOT_YET = {"s3", "hf"}


class Source(Protocol):
    """A checkpoint's origin. `lowest_tier` is where its bytes are when FlashServe holds none."""

    @property
    def uri(self) -> str: ...

    @property
    def lowest_tier(self) -> Tier: ...

    def directory(self) -> Path:
        """The checkpoint's files, brought to this machine first if need be (which may take long).

        Raises:
            SourceError: they are missing or cannot be had.
        """

    def identity(self) -> str:
        """Changes whenever a file of the checkpoint does; equal for sources of the same bytes.

        Raises:
            SourceError: as for `directory`.
        """


class DirectorySource:
    """A checkpoint in a directory of this machine."""

    lowest_tier = Tier.DISK

    def __init__(self, uri: str, path: Path) -> None:
        self.uri = uri
        self._path = path

    def directory(self) -> Path:
        try:
            resolved = self._path.resolve(strict=True)
            with os.scandir(resolved):
                return resolved
        except FileNotFoundError:
            raise SourceError(f"source {shown(self.uri)} does not exist") from None
        except NotADirectoryError:
            raise SourceError(
                f"source {shown(self.uri)} is not a directory: name the one that holds config.json"
            ) from None
        except (OSError, ValueError, RuntimeError) as error:
            raise SourceError(
                f"source {shown(self.uri)} cannot be read: {one_line(error)}"
            ) from None

    def identity(self) -> str:
        return _identity(self.directory())


class DemoSource:
    """The demo model, made once from a Python package and kept in the data directory."""

    lowest_tier = Tier.DISK

    def __init__(self, uri: str, data_dir: Path) -> None:
        self.uri = uri
        self._path = data_dir.absolute() / "models" / DEMO_NAME

    def directory(self) -> Path:
        # The conversion renames a finished directory into place, so one file speaks for all.
        if not (self._path / "model.safetensors").is_file():
            self._convert()
        return self._path.resolve()

    def identity(self) -> str:
        return _identity(self.directory())

    def _convert(self) -> None:
        """In a process of its own, which dies with this one: it takes seconds of a whole core."""
        command = [sys.executable, "-m", "flashserve.store.demo", str(self._path)]
        done = subprocess.run(  # noqa: S603
            [*command, "--die-with-parent"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            reason = lines[-1].removeprefix("error: ")
            raise SourceError(f"{self.uri} cannot be made: {reason}")


def open_source(uri: str, data_dir: Path) -> Source:
    """The source that `uri` names: a directory, or `demo:smollm2`. Reads nothing yet.

    Raises:
        SourceError: the scheme is unknown or not available.
    """
    scheme = scheme_of(uri)
    if scheme is None:
        if not uri:
            raise SourceError("the source is empty: name a directory or demo:smollm2")
        return DirectorySource(uri, Path(uri))
    if uri == f"demo:{DEMO_NAME}":
        return DemoSource(uri, data_dir)
    if scheme == "demo":
        raise SourceError(f"source {shown(uri)}: the only demo model is demo:{DEMO_NAME}")
    if scheme in _NOT_YET:
        raise SourceError(
            f"source {shown(uri)}: {scheme}:// is not available in this version; download the "
            "checkpoint and name its directory"
        )
    raise SourceError(
        f"source {shown(uri)}: unknown scheme {scheme}; name a directory or demo:{DEMO_NAME}"
    )


def scheme_of(uri: str) -> str | None:
    """The scheme in lower case; None for a directory."""
    match = _SCHEME.match(uri)
    return (match[1] or match[2]).lower() if match else None


def check_allowed(uri: str, roots: Iterable[Path], schemes: Iterable[str]) -> None:
    """May someone who reaches this server over a network deploy `uri`?

    Raises:
        ForbiddenError: a directory outside `roots` once links and `..` are followed, whether or
            not it exists, or a scheme outside `schemes`.
    """
    scheme = scheme_of(uri)
    if scheme is not None:
        if scheme not in schemes:
            raise ForbiddenError(
                f"sources of scheme {scheme} may not be deployed over HTTP (deploy.schemes)"
            )
        return
    try:
        path = Path(uri).resolve()
        allowed = any(path.is_relative_to(root.resolve()) for root in roots)
    except (OSError, ValueError, RuntimeError):
        allowed = False
    if not allowed:
        raise ForbiddenError(
            f"source {shown(uri)} is not below a directory that may be deployed over HTTP "
            "(deploy.roots)"
        )


def _identity(directory: Path) -> str:
    """The resolved path, and a hash of name, size and mtime_ns of every file of the checkpoint."""
    try:
        with os.scandir(directory) as entries:
            facts = sorted(
                (entry.name, entry.stat().st_size, entry.stat().st_mtime_ns)
                for entry in entries
                if entry.name.endswith(_PARTS) and entry.is_file()
            )
    except OSError as error:
        raise SourceError(f"source {directory} cannot be read: {one_line(error)}") from None
    return f"{directory}#{xxhash.xxh3_64_hexdigest(repr(facts).encode())}"
