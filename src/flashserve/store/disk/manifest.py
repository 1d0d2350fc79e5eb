"""What the disk tier says of a checkpoint that it holds; believed only when checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import blake3
import msgspec
import xxhash

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.files import one_line
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk.folder import Folder, check_plain

MANIFEST = ".manifest.json"
MAX_MANIFEST_BYTES = 64 << 20
MAX_FILE_BYTES = 1 << 50
DIGEST = r"^[0-9a-f]{64}$"

_Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_FILE_BYTES)]
_Checksum = Annotated[int, msgspec.Meta(ge=0)]
_Digest = Annotated[str, msgspec.Meta(pattern=DIGEST)]


@dataclasses.dataclass(frozen=True, slots=True)
class Stored:
    """A checkpoint of the disk tier: its files lie verbatim in `directory`.

    checksums are the xxh3 of each chunk by file name, digests the BLAKE3 of whole files (hex) as
    far as they are known. num_bytes are those of all files, shared ones too.
    """

    directory: Path
    listing: Listing
    checksums: dict[str, tuple[int, ...]]
    digests: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return listed_bytes(self.listing)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    num_bytes: _Size
    identity: str
    digests: tuple[tuple[str, str], ...]
    checksums: tuple[_Checksum, ...]
    blake3: _Digest | None = None


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    uri: str
    identity: str
    files: tuple[_File, ...]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: Literal[1]
    xxh3: _Checksum
    body: msgspec.Raw


def listed_bytes(listing: Listing) -> int:
    return sum(file.num_bytes for file in listing.files)


def key_of(identity: str) -> str:
    """The name of an identity's place on disk: hex, whatever the identity has in it."""
    return blake3.blake3(identity.encode()).hexdigest(length=16)


def check_listing(listing: Listing) -> None:
    """Refuses a listing whose files cannot lie in one directory of ours.

    Raises:
        CheckpointError: a name is not plain or comes twice, or a size is absurd.
    """
    names = [file.name for file in listing.files]
    for file in listing.files:
        check_plain(file.name)
        if not 0 <= file.num_bytes <= MAX_FILE_BYTES:
            raise CheckpointError(f"{file.name} is listed with {file.num_bytes} bytes")
    if len(set(names)) != len(names):
        raise CheckpointError(f"a file is listed twice in {listing.uri}")


def write_manifest(folder: Folder, stored: Stored) -> None:
    """Puts the manifest in place, durably.

    Raises:
        OSError: it cannot be written.
    """
    files = tuple(
        _File(
            file.name,
            file.num_bytes,
            file.identity,
            file.digests,
            stored.checksums[file.name],
            stored.digests.get(file.name),
        )
        for file in stored.listing.files
    )
    body = msgspec.json.encode(_Body(stored.listing.uri, stored.listing.identity, files))
    envelope = _Envelope(1, xxhash.xxh3_64_intdigest(body), msgspec.Raw(body))
    folder.write(MANIFEST, msgspec.json.encode(envelope))


def read_manifest(folder: Folder, directory: Path, key: str) -> Stored:
    """What the manifest in `folder` says of the checkpoint `key`, whose files are in `directory`.

    Raises:
        CheckpointError: it is missing, torn, damaged, or speaks of something else.
    """
    try:
        envelope = msgspec.json.decode(folder.read(MANIFEST, MAX_MANIFEST_BYTES), type=_Envelope)
        if xxhash.xxh3_64_intdigest(bytes(envelope.body)) != envelope.xxh3:
            raise CheckpointError(f"{folder.path / MANIFEST} is damaged")
        body = msgspec.json.decode(envelope.body, type=_Body)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = one_line(error)
        raise CheckpointError(f"{folder.path / MANIFEST} cannot be used: {reason}") from None
    files = tuple(
        SourceFile(file.name, file.num_bytes, file.identity, file.digests) for file in body.files
    )
    listing = Listing(body.uri, body.identity, files)
    check_listing(listing)
    if key_of(body.identity) != key:
        raise CheckpointError(f"{folder.path / MANIFEST} belongs to another checkpoint")
    for file, record in zip(files, body.files, strict=True):
        if len(record.checksums) != file.num_chunks:
            raise CheckpointError(f"{folder.path / MANIFEST} lacks checksums of {file.name}")
    return Stored(
        directory,
        listing,
        {file.name: file.checksums for file in body.files},
        {file.name: file.blake3 for file in body.files if file.blake3 is not None},
    )
