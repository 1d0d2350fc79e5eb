"""Checkpoints in an object store: boto3 finds and signs, the bytes come through `ranges`."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import re
import threading
import time
from collections.abc import Callable

import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.files import shown
from flashserve.store.checkpoint.listing import FileReader, Listing, SourceFile
from flashserve.store.sources.connections import Place, is_protected
from flashserve.store.sources.listed import select
from flashserve.store.sources.ranges import RangeReader
from flashserve.store.sources.rate import remote_limit
from flashserve.store.sources.s3client import SIGNED_S, Object, ObjectStore
from flashserve.types import Tier

_URI = re.compile(r"s3://([A-Za-z0-9][A-Za-z0-9._-]{1,254})(?:/(.*))?", re.IGNORECASE | re.DOTALL)
_MD5 = re.compile(r"[0-9a-f]{32}")
_MAX_OBJECTS = 20_000
_NUM_HEADS = 8


class S3Source:
    """The objects right below a prefix. Region, endpoint and credentials are boto3's to find."""

    lowest_tier = Tier.REMOTE

    def __init__(
        self, uri: str, settings: StoreSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Asks nobody yet.

        Raises:
            SourceError: the address is none of a bucket and prefix.
        """
        match = _URI.fullmatch(uri)
        prefix = (match[2] or "").strip("/") if match else ""
        climbs = any(part in {"", ".", ".."} for part in prefix.split("/")) if prefix else False
        if match is None or climbs or not prefix.isprintable():
            raise SourceError(f"source {shown(uri)}: write s3://bucket/prefix")
        self.uri = uri
        self._settings = settings
        self._clock = clock
        self._prefix = f"{prefix}/" if prefix else ""
        self._place = f"s3://{match[1]}/{prefix}".rstrip("/")
        self._store = ObjectStore(match[1], settings)
        self._etags: dict[str, str] = {}  # by the identity of the file, as last listed

    def listing(self) -> Listing:
        """See Source.

        Raises:
            SourceError: the objects cannot be listed, or one has an odd name.
            CheckpointError: they are no checkpoint.
        """
        with self._store.connected():
            files = self._with_digests(select(self, self._place, self._find()))
        facts = repr([(file.name, file.identity) for file in files])
        identity = f"{self._place}#{xxhash.xxh3_64_hexdigest(facts.encode())}"
        return Listing(self.uri, identity, files, is_protected(self._store.endpoint()))

    def open(self, file: SourceFile) -> FileReader:
        if file.identity not in self._etags:
            self.listing()
        etag = self._etags.get(file.identity)
        if etag is None:
            raise CheckpointError(
                f"{self._place}/{file.name} changed since it was listed: stage the model again"
            )
        key = self._prefix + file.name
        return RangeReader(
            f"{self._place}/{file.name}",
            file.num_bytes,
            _Signed(lambda: self._store.sign(key), self._clock),
            self._settings,
            remote_limit(self._settings.remote_bytes_per_s),
            etag=etag or None,
            ca_bundle=self._store.ca_bundle(),
        )

    def _find(self) -> list[SourceFile]:
        found = []
        for each in self._store.objects(self._prefix):
            name = each.key.removeprefix(self._prefix)
            if not each.key.startswith(self._prefix) or ".." in name.split("/"):
                raise SourceError(f"{self._place} lists {shown(each.key)}, which leads out of it")
            if name and "/" not in name:
                found.append(self._source_file(name, each))
            if len(found) > _MAX_OBJECTS:
                raise SourceError(f"{self._place} holds more than {_MAX_OBJECTS} objects")
        if not found:
            raise SourceError(f"source {shown(self.uri)}: there is no object below {self._place}/")
        return found

    def _source_file(self, name: str, each: Object) -> SourceFile:
        version = each.etag or each.modified
        where = f"{self._store.endpoint()}/{self._place.removeprefix('s3://')}/{name}"
        identity = f"s3:{where}:{each.num_bytes}:{version}"
        self._etags[identity] = each.etag
        return SourceFile(name, each.num_bytes, identity)

    def _with_digests(self, files: tuple[SourceFile, ...]) -> tuple[SourceFile, ...]:
        with concurrent.futures.ThreadPoolExecutor(_NUM_HEADS, "store-head") as pool:
            return tuple(pool.map(self._with_digest, files))

    def _with_digest(self, file: SourceFile) -> SourceFile:
        """The file, with its MD5 where the ETag is one."""
        etag = self._etags[file.identity]
        if not _MD5.fullmatch(etag) or self._store.is_encrypted(self._prefix + file.name):
            return file
        return dataclasses.replace(file, digests=(("md5", etag),))


class _Signed:
    """Where an object is: a signed URL, made anew well before it expires. Thread-safe."""

    def __init__(self, sign: Callable[[], str], clock: Callable[[], float]) -> None:
        self._sign = sign
        self._clock = clock
        self._lock = threading.Lock()
        self._url = ""
        self._made_at = 0.0

    def __call__(self, renew: bool) -> Place:
        with self._lock:
            now = self._clock()
            if renew or not self._url or now - self._made_at > SIGNED_S / 2:
                self._url, self._made_at = self._sign(), now
            return Place(self._url, {})
