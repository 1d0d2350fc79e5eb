"""Checkpoints on a model hub: huggingface_hub says what there is, the bytes come through `ranges`.

Importing this module does not import huggingface_hub, which reads its environment (HF_HOME,
HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN) when it is imported itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError, SourceUnavailableError
from flashserve.store.checkpoint.files import one_line, shown
from flashserve.store.checkpoint.listing import FileReader, Listing, SourceFile
from flashserve.store.checkpoint.naming import ADAPTER_CONFIG_NAME
from flashserve.store.sources.connections import Place, is_protected
from flashserve.store.sources.listed import select
from flashserve.store.sources.local import list_directory
from flashserve.store.sources.ranges import RangeReader
from flashserve.store.sources.rate import remote_limit
from flashserve.store.sources.reading import LocalReader
from flashserve.types import Tier

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_REVISION = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"
_URI = re.compile(
    rf"hf://((?:{_NAME}/)?{_NAME})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,127}}))?", re.IGNORECASE
)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TIMEOUT_S = 10.0


class HfSource:
    """A revision of a model repository; from the hub's cache on this machine when it is there."""

    def __init__(self, uri: str, settings: StoreSettings) -> None:
        """Asks nobody yet.

        Raises:
            SourceError: the address is none of a repository and revision.
        """
        match = _URI.fullmatch(uri)
        if match is None or any(bad in uri[5:] for bad in ("..", "--", "//")):
            raise SourceError(f"source {shown(uri)}: write hf://org/name or hf://org/name@revision")
        self.uri = uri
        self._repo = match[1]
        self._revision = match[2] or "main"
        self._settings = settings
        self._commit = ""
        self._cached: Path | None = None
        self._remote: frozenset[SourceFile] = frozenset()

    @property
    def lowest_tier(self) -> Tier:
        """REMOTE, unless the last listing was of the hub's cache on this machine."""
        return Tier.DISK if self._cached else Tier.REMOTE

    def listing(self) -> Listing:
        """See Source.

        Raises:
            SourceError: the hub does not have it, or neither hub nor cache can be reached.
            CheckpointError: the repository is no checkpoint.
        """
        from huggingface_hub import constants

        self._remote, self._cached = frozenset(), None
        if constants.HF_HUB_OFFLINE:
            return self._cached_listing(SourceError, "HF_HUB_OFFLINE is set")
        try:
            info = _ask(self._repo, self._revision)
        except _UnreachableError as error:
            return self._cached_listing(SourceUnavailableError, str(error))
        self._commit = str(info.sha)
        found = tuple(self._found(info))
        self._remote = frozenset(found)
        files = select(self, self.uri, found)
        snapshot = _snapshot(self._repo, self._commit)
        if snapshot and _holds(snapshot, files):
            return self._listed_in(snapshot)
        facts = repr([(file.name, file.identity) for file in files])
        identity = f"hf:{self._repo}@{self._commit}#{xxhash.xxh3_64_hexdigest(facts.encode())}"
        return Listing(self.uri, identity, files, is_protected(_endpoint()))

    def open(self, file: SourceFile) -> FileReader:
        if not self._remote and self._cached is None:
            self.listing()
        if file in self._remote:
            return RangeReader(
                f"{self.uri}/{file.name}",
                file.num_bytes,
                lambda _renew: self._place(file.name),
                self._settings,
                remote_limit(self._settings.remote_bytes_per_s),
            )
        if self._cached is None:
            raise CheckpointError(
                f"{self.uri}/{file.name} changed since it was listed: stage the model again"
            )
        return LocalReader(self._cached, file, self._settings)

    def _found(self, info: Any) -> Iterator[SourceFile]:
        """The files at the top of the repository."""
        for each in info.siblings or ():
            name, lfs = each.rfilename, each.lfs
            if ".." in name.split("/"):
                raise SourceError(f"{self.uri} lists {shown(name)}, which leads out of it")
            num_bytes = lfs.size if lfs else each.size
            if "/" in name or num_bytes is None:
                continue
            if lfs and _SHA256.fullmatch(lfs.sha256):
                identity = f"hf:{_endpoint()}/{self._repo}:sha256:{lfs.sha256}:{num_bytes}"
                yield SourceFile(name, num_bytes, identity, (("sha256", lfs.sha256),))
            else:
                identity = f"hf:{_endpoint()}/{self._repo}@{self._commit}/{name}:{num_bytes}"
                yield SourceFile(name, num_bytes, identity)

    def _place(self, name: str) -> Place:
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        url = hf_hub_url(self._repo, name, revision=self._commit)
        headers = build_hf_headers(library_name="flashserve")
        return Place(url, headers)

    def _cached_listing(self, absent: type[SourceError], why: str) -> Listing:
        snapshot = _snapshot(self._repo, self._revision)
        if snapshot is None:
            raise absent(f"{self.uri} is not in the hub's cache on this machine, and {why}")
        return self._listed_in(snapshot)

    def _listed_in(self, snapshot: Path) -> Listing:
        self._remote, self._cached = frozenset(), snapshot.resolve()
        return list_directory(self.uri, self._cached)


class _UnreachableError(Exception):
    """The hub did not answer, or not sensibly; the message ends a sentence."""


def _ask(repo: str, revision: str) -> Any:
    """The hub's account of a revision, with the sizes of its files."""
    import huggingface_hub
    from huggingface_hub import errors

    name = f"hf://{repo}"
    try:
        return huggingface_hub.HfApi().model_info(
            repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S
        )
    except errors.GatedRepoError:
        raise SourceError(
            f"{name} is gated: accept its terms on the hub and set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{name} has no revision {shown(revision)}") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{name} does not exist on the hub, or needs a token that may read it (HF_TOKEN)"
        ) from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status < 500 and status != 429:
            raise SourceError(f"{name} cannot be read: the hub answers {status}") from None
        raise _UnreachableError(f"the hub answers {status}") from None
    except (errors.HTTPError, OSError) as error:  # type: ignore[attr-defined]
        raise _UnreachableError(f"the hub cannot be reached: {one_line(error)}") from None
    except ValueError as error:
        raise SourceError(f"{name} cannot be read: {one_line(error)}") from None


def _snapshot(repo: str, revision: str) -> Path | None:
    """Where the hub's cache keeps a revision, perhaps not all of it."""
    import huggingface_hub

    for name in ("config.json", ADAPTER_CONFIG_NAME):
        path = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _holds(snapshot: Path, files: tuple[SourceFile, ...]) -> bool:
    paths = [snapshot / file.name for file in files]
    return all(
        path.is_file() and path.stat().st_size == file.num_bytes
        for path, file in zip(paths, files, strict=True)
    )


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT
