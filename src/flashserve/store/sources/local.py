"""Checkpoints on this machine's disks: directories, and the demo model."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.files import (
    MAX_FILES,
    DirectoryFiles,
    is_plain,
    is_small,
    one_line,
    resolve_file,
    shown,
)
from flashserve.store.checkpoint.listing import FileReader, Listing, SourceFile
from flashserve.store.checkpoint.naming import find_weights, small_names
from flashserve.store.sources.reading import LocalReader, file_identity
from flashserve.types import Tier

DEMO_NAME = "smollm2"


class DirectorySource:
    """A checkpoint in a directory of this machine."""

    lowest_tier = Tier.DISK

    def __init__(self, uri: str, path: Path, settings: StoreSettings) -> None:
        self.uri = uri
        self._path = path
        self._settings = settings

    def directory(self) -> Path:
        """Where the checkpoint's files are (making them first may take long).

        Raises:
            SourceError: they are missing or cannot be had.
        """
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

    def listing(self) -> Listing:
        return list_directory(self.uri, self.directory())

    def open(self, file: SourceFile) -> FileReader:
        return LocalReader(self.directory(), file, self._settings)


class DemoSource(DirectorySource):
    """The demo model, made once from a Python package and kept in the data directory."""

    def __init__(self, uri: str, data_dir: Path, settings: StoreSettings) -> None:
        super().__init__(uri, data_dir.absolute() / "models" / DEMO_NAME, settings)

    def directory(self) -> Path:
        # The conversion renames a finished directory into place, so one file speaks for all.
        if not (self._path / "model.safetensors").is_file():
            self._convert()
        return self._path.resolve()

    def _convert(self) -> None:
        """In a process of its own, which dies with this one: it takes seconds of a whole core."""
        command = [sys.executable, "-m", "flashserve.store.sources.demo", str(self._path)]
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


def list_directory(uri: str, directory: Path) -> Listing:
    """The checkpoint in a resolved directory, weights and small files.

    Raises:
        CheckpointError: there are no weights, a shard is missing, or a link leads out.
    """
    files = DirectoryFiles(directory)
    names = {name for name in small_names(files.names()) if is_plain(name)}
    names.update(find_weights(files).names)
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{directory} has {len(names)} files; at most {MAX_FILES} are listed")
    found = (_stat(directory, name) for name in sorted(names))
    listed = tuple(file for file in found if file)
    facts = repr([(file.name, file.identity) for file in listed])
    return Listing(uri, f"{directory}#{xxhash.xxh3_64_hexdigest(facts.encode())}", listed)


def _stat(directory: Path, name: str) -> SourceFile | None:
    """None for a small file that is no regular one, or that vanished."""
    try:
        path = resolve_file(directory, name)
        status = path.stat()
    except FileNotFoundError:
        if is_small(name):
            return None
        raise CheckpointError(f"{directory / name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{directory / name} cannot be read: {one_line(error)}") from None
    if not stat.S_ISREG(status.st_mode):
        if is_small(name):
            return None
        raise CheckpointError(f"{directory / name} is not a regular file")
    return SourceFile(name, status.st_size, file_identity(path, status))
