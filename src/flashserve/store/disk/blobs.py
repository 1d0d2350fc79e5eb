"""Equal files of several checkpoints are one file: hard links, with a name by content in `blobs`.

A file joins when its BLAKE3 is known. Nothing is looked up through a blob, so a stray one costs
space at most, and a missing one only costs a later checkpoint its sharing.
"""

from __future__ import annotations

import collections
import contextlib
import errno
from collections.abc import Iterator

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.files import is_small
from flashserve.store.checkpoint.listing import Listing
from flashserve.store.disk.folder import Folder
from flashserve.store.disk.index import BLOBS, DiskIndex, Entry
from flashserve.store.disk.manifest import Stored

_NO_LINKS = {errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP}


def share(index: DiskIndex, entry: Entry, name: str, digest: str) -> None:
    """Makes the file of a checkpoint and the blob of its digest one.

    They stay apart where the chunk checksums of the blob's other files differ from this file's, and
    on a file system that refuses hard links.

    Raises:
        OSError: the disk is full or fails.
    """
    assert entry.stored is not None
    blobs = index.folder(BLOBS)
    twin = next(_holders(index, digest, entry, name), None)
    try:
        with index.open(entry.area, entry.key) as folder:
            if twin is None or blobs.facts(digest) is None:
                folder.link(name, blobs, digest)
            elif twin == entry.stored.checksums[name]:
                blobs.link(digest, folder, name)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise


def adopt(index: DiskIndex, listing: Listing, folder: Folder) -> dict[str, tuple[int, ...]]:
    """Gives `folder`, where a checkpoint comes to be, the weights that a whole checkpoint has too
    by their identity; their chunk checksums by name. What they hold is not compared with those.

    Raises:
        OSError: the disk is full or fails.
    """
    held = {
        (file.identity, file.num_bytes): (entry, stored, file.name)
        for entry, stored in index.checkpoints()
        for file in stored.listing.files
    }
    adopted = {}
    for file in listing.files:
        if is_small(file.name) or (file.identity, file.num_bytes) not in held:
            continue
        entry, stored, name = held[file.identity, file.num_bytes]
        try:
            with index.open(entry.area, entry.key) as source:
                source.link(name, folder, file.name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        else:
            adopted[file.name] = stored.checksums[name]
    return adopted


def replace(index: DiskIndex, entry: Entry, stored: Stored, name: str, fresh: str) -> None:
    """Puts the file `fresh` of a checkpoint's directory in the place of its file `name`, and of
    everything that shared the old one. Cut off by a crash, it leaves the rest to the next repair.

    Raises:
        OSError: the disk is full or fails.
    """
    blobs = index.folder(BLOBS)
    digest = stored.digests.get(name)
    with index.open(entry.area, entry.key) as folder:
        old = folder.facts(name)
        if old is not None:
            for other, others in index.checkpoints():
                with index.open(other.area, other.key) as shared:
                    for each in others.checksums:
                        facts = shared.facts(each)
                        if facts is not None and facts.st_ino == old.st_ino:
                            folder.link(fresh, shared, each)
                    shared.sync()
        if digest is not None and blobs.facts(digest) is not None:
            folder.link(fresh, blobs, digest)
        # Renaming onto a name of the same file does nothing, and leaves both.
        folder.rename(fresh, folder, name)
        folder.remove(fresh)
        folder.sync()
    for other, others in index.checkpoints():
        with contextlib.suppress(CheckpointError):  # damaged as well, and found in its turn
            index.refresh(other, others)


def remove_strays(index: DiskIndex) -> list[str]:
    """Removes blobs that no manifest names, or that are not the files of those; their names.

    Raises:
        OSError: the disk fails.
    """
    files: dict[str, set[int]] = collections.defaultdict(set)
    for entry, stored in index.checkpoints():
        for digest in stored.digests.values():
            files[digest] |= entry.inodes.keys()
    blobs = index.folder(BLOBS)
    strays = []
    for name in blobs.names():
        facts = blobs.facts(name)
        if facts is None or facts.st_ino not in files.get(name, ()):
            blobs.remove_any(name)
            strays.append(name)
    return strays


def release(index: DiskIndex, stored: Stored) -> None:
    """Removes the blobs of a checkpoint that has gone, unless another one has them too.

    Raises:
        OSError: the disk fails.
    """
    kept = {digest for _, other in index.checkpoints() for digest in other.digests.values()}
    for digest in set(stored.digests.values()) - kept:
        index.folder(BLOBS).remove(digest)


def _holders(
    index: DiskIndex, digest: str, besides: Entry, besides_name: str
) -> Iterator[tuple[int, ...]]:
    """Chunk checksums of every other file that has that digest."""
    for entry, stored in index.checkpoints():
        for name, found in stored.digests.items():
            if found == digest and (entry is not besides or name != besides_name):
                yield stored.checksums[name]
