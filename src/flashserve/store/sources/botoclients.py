"""boto3's clients, shared by all who read alike, since making one takes long.

Importing this module does not import boto3.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from flashserve.config import StoreSettings

_MAX_TIMEOUT_S = 10.0  # for an answer to a short question
_OTHER_VARIABLES = {"HOME", "SSL_CERT_FILE"}
_FILES = {
    "AWS_CONFIG_FILE": "~/.aws/config",
    "AWS_SHARED_CREDENTIALS_FILE": "~/.aws/credentials",
}

Environment = tuple[object, ...]
_Kind = tuple[int, float]


@dataclasses.dataclass(slots=True)
class Shared:
    """A client, and what of its configuration others need. ca_bundle: a file of certificates."""

    client: Any
    ca_bundle: str | None
    environment: Environment = ()
    num_users: int = 0


class Clients:
    """One client per kind of retries and timeouts, as long as the environment is what it was.

    Thread-safe, as clients are.
    """

    def __init__(self, make: Callable[[int, float], Shared]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._shared: dict[_Kind, Shared] = {}

    @contextlib.contextmanager
    def using(self, settings: StoreSettings) -> Iterator[Shared]:
        """Lends a client. The last user closes its connections; it can be lent again.

        Raises:
            botocore's errors: its configuration cannot be used.
        """
        shared = self._take((settings.remote_retries, settings.remote_timeout_s))
        try:
            yield shared
        finally:
            with self._lock:
                shared.num_users -= 1
                if not shared.num_users:
                    shared.client.close()

    def _take(self, kind: _Kind) -> Shared:
        with self._lock:
            environment = _environment()
            shared = self._shared.get(kind)
            if shared is None or shared.environment != environment:
                retries, timeout_s = kind
                shared = self._make(retries, min(timeout_s, _MAX_TIMEOUT_S))
                shared.environment = environment
                self._shared[kind] = shared
            shared.num_users += 1
            return shared


def _environment() -> Environment:
    """Changes with whatever boto3 is configured by: variables, and files by size and time.

    Credentials that boto3 renews by itself are its own business.
    """
    variables = sorted(
        (name, value)
        for name, value in os.environ.items()
        if name.startswith("AWS_") or name in _OTHER_VARIABLES or name.lower().endswith("_proxy")
    )
    paths = (Path(os.environ.get(name, usual)) for name, usual in _FILES.items())
    return (*variables, *(_version(path) for path in paths))


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        facts = path.expanduser().stat()
    except (OSError, RuntimeError):
        return None
    return facts.st_ino, facts.st_size, facts.st_mtime_ns


def _make_client(retries: int, timeout_s: float) -> Shared:
    import boto3
    import botocore
    import botocore.config
    import botocore.session

    core = botocore.session.get_session()
    session = boto3.Session(botocore_session=core)
    has_credentials = session.get_credentials() is not None
    # One answer for listing and reading: what boto3 is told to trust, or else what Python is.
    named = core.get_config_variable("ca_bundle")
    ca_bundle = named or os.environ.get("SSL_CERT_FILE") or None
    config = botocore.config.Config(
        signature_version="s3v4" if has_credentials else botocore.UNSIGNED,
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": retries + 1, "mode": "standard"},
    )
    return Shared(session.client("s3", config=config, verify=ca_bundle), ca_bundle)


CLIENTS = Clients(_make_client)
"""Those of this process."""
