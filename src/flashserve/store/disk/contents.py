"""What lies in the directory of one checkpoint of the disk tier, and what does not belong there."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from flashserve.errors import CheckpointError
from flashserve.store.disk.folder import Folder
from flashserve.store.disk.manifest import MANIFEST, Stored


def settle(folder: Folder, stored: Stored) -> None:
    """Leaves in `folder` just the files and their manifest, which is written already; durable.

    Raises:
        CheckpointError: a file is missing or has another length.
        OSError: the disk fails.
    """
    for file in stored.listing.files:
        if folder.facts(file.name) is None and folder.facts(part_name(file.name)) is not None:
            folder.rename(part_name(file.name), folder, file.name)
    check_files(folder, stored)
    remove_strangers(folder, stored)
    folder.sync()


def check_files(folder: Folder, stored: Stored) -> dict[int, int]:
    """Bytes by inode of the files of a whole checkpoint.

    Raises:
        CheckpointError: a file is missing, is a link, or has another length.
        OSError: the disk fails.
    """
    inodes = {}
    for file in stored.listing.files:
        fd = -1
        try:
            fd = folder.open(file.name, os.O_RDONLY)
            facts = os.fstat(fd)
        except OSError as error:
            reason = error.strerror
            raise CheckpointError(f"{folder.path / file.name} cannot be used: {reason}") from None
        finally:
            if fd >= 0:
                os.close(fd)
        if facts.st_size != file.num_bytes:
            raise CheckpointError(
                f"{folder.path / file.name} has {facts.st_size} bytes instead of {file.num_bytes}"
            )
        inodes[facts.st_ino] = facts.st_size
    return inodes


def remove_strangers(folder: Folder, stored: Stored) -> list[str]:
    """Removes whatever does not belong into a whole checkpoint's directory; their names."""
    strangers = [
        name for name in folder.names() if name not in stored.checksums and name != MANIFEST
    ]
    for name in strangers:
        folder.remove_any(name)
    return strangers


def is_own(name: str) -> bool:
    """Is it a small file of ours, which no budget counts?"""
    return name == MANIFEST or (name.startswith(".") and name.endswith(".journal"))


def has_chunks(folder: Folder) -> bool:
    """Is there anything in the place of an interrupted fetch that is worth resuming?"""
    journals = [name for name in folder.names() if name.endswith(".journal")]
    return any((facts := folder.facts(name)) and facts.st_size for name in journals)


def relocated(stored: Stored, directory: Path) -> Stored:
    return dataclasses.replace(stored, directory=directory)


def part_name(name: str) -> str:
    return f".{name}.part"


def journal_name(name: str) -> str:
    return f".{name}.journal"
