"""Config, tokenizer and the like of remote checkpoints: `snapshots/KEY` of a data directory.

They stay where they are, whatever becomes of the weights: tokenizers are read from them, late.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from flashserve.store.checkpoint.files import is_small
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk.folder import disk_errors
from flashserve.store.disk.index import CHECKPOINTS
from flashserve.store.disk.manifest import key_of

MIN_AGE_S = 24 * 3600.0
"""What was used so recently stays: somebody may be about to deploy it, or have it open."""


class SmallFiles:
    """The directories that the checkpoints of one store have, or get."""

    def __init__(self, data_dir: Path) -> None:
        self._root = data_dir / "snapshots"

    def directory(self, listing: Listing, read: Callable[[SourceFile], bytes]) -> Path:
        """The directory of a checkpoint, which counts as used now; filled by `read` if it is new.

        Raises:
            UnavailableError: the disk is full or fails.
            FlashServeError: what `read` raises.
        """
        directory = self._root / key_of(listing.identity)
        with contextlib.suppress(OSError):
            os.utime(directory)
            return directory
        with disk_errors(self._root):
            directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial = directory.with_name(f".{secrets.token_hex(8)}.partial")
            partial.mkdir(mode=0o700)
        try:
            for file in filter(lambda each: is_small(each.name), listing.files):
                data = read(file)
                with disk_errors(self._root):
                    (partial / file.name).write_bytes(data)
            with contextlib.suppress(OSError):  # somebody else was faster, with the same bytes
                partial.rename(directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return directory


def sweep(
    data_dir: Path,
    in_use: Iterable[Path],
    *,
    min_age_s: float = MIN_AGE_S,
    clock: Callable[[], float] = time.time,
) -> int:
    """Removes the directories of checkpoints that are neither in use nor on disk any more, and what
    a dead process left half-made; how many those were.

    Args:
        in_use: directories of all models that are deployed on this data directory.
        min_age_s: what was used in the last so many seconds stays.

    Raises:
        UnavailableError: the directories cannot be looked at.
    """
    kept = {directory.name for directory in in_use}
    checkpoints = data_dir / "store" / CHECKPOINTS
    num_removed = 0
    with disk_errors(data_dir / "snapshots"), contextlib.suppress(FileNotFoundError):
        for directory in (data_dir / "snapshots").iterdir():
            if directory.name in kept or (checkpoints / directory.name).is_dir():
                continue
            with contextlib.suppress(FileNotFoundError):  # another process sweeps too
                if clock() - directory.lstat().st_mtime >= min_age_s:
                    num_removed += _remove(directory)
    return num_removed


def _remove(directory: Path) -> bool:
    """Whether it has gone, in one step as others see it."""
    doomed = directory.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        directory.rename(doomed)
    except OSError:
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return not doomed.exists()
