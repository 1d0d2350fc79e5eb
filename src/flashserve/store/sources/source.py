"""Where checkpoints come from: what an address names, and who may name it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.errors import ForbiddenError, SourceError
from flashserve.store.checkpoint.files import shown
from flashserve.store.checkpoint.listing import Source
from flashserve.store.sources.hf import HfSource
from flashserve.store.sources.local import DEMO_NAME, DemoSource, DirectorySource
from flashserve.store.sources.s3 import S3Source

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(demo|s3|hf):")
_DEFAULTS = StoreSettings()


def open_source(uri: str, data_dir: Path, settings: StoreSettings = _DEFAULTS) -> Source:
    """The source that `uri` names: a directory, s3://bucket/prefix, hf://org/name[@revision] or
    demo:smollm2. Reads nothing and asks nobody yet.

    Raises:
        SourceError: the scheme is unknown, or the address is none of its scheme.
    """
    scheme = scheme_of(uri)
    if scheme is None:
        if not uri:
            raise SourceError("the source is empty: name a directory or demo:smollm2")
        return DirectorySource(uri, Path(uri), settings)
    if uri == f"demo:{DEMO_NAME}":
        return DemoSource(uri, data_dir, settings)
    if scheme == "demo":
        raise SourceError(f"source {shown(uri)}: the only demo model is demo:{DEMO_NAME}")
    if scheme == "s3":
        return S3Source(uri, settings)
    if scheme == "hf":
        return HfSource(uri, settings)
    raise SourceError(
        f"source {shown(uri)}: unknown scheme {scheme}; name a directory, s3://bucket/prefix, "
        f"hf://org/name or demo:{DEMO_NAME}"
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
