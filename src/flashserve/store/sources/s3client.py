"""What is asked of boto3: to find configuration and credentials, to list, and to sign."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from flashserve.config import StoreSettings
from flashserve.errors import SourceError
from flashserve.store.checkpoint.files import one_line

SIGNED_S = 3600
_MAX_TIMEOUT_S = 10.0  # for an answer to a short question


class Object(NamedTuple):
    """etag is without quotes, empty where the store gives none."""

    key: str
    num_bytes: int
    etag: str
    modified: str


class ObjectStore:
    """A bucket as the usual environment and files configure it. Thread-safe; asks lazily."""

    def __init__(self, bucket: str, settings: StoreSettings) -> None:
        self._bucket = bucket
        self._settings = settings
        self._lock = threading.Lock()
        self._made: Any = None

    def endpoint(self) -> str:
        return str(self._client().meta.endpoint_url)

    def ca_bundle(self) -> str | None:
        """The file of certificates to trust, where the usual settings name one."""
        import botocore.session

        with self._translated():
            return _ca_bundle(botocore.session.get_session())

    def objects(self, prefix: str) -> Iterator[Object]:
        """Those whose keys start with `prefix` and have no further slash.

        Raises:
            SourceError: they cannot be listed, also for want of boto3 or of its configuration.
        """
        paginator = self._client().get_paginator("list_objects_v2")
        with self._translated():
            for page in paginator.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                for each in page.get("Contents", ()):
                    etag = each.get("ETag", "").strip('"')
                    yield Object(each["Key"], each["Size"], etag, str(each.get("LastModified")))

    def is_encrypted(self, key: str) -> bool:
        """With a key of its own, so that an ETag in the form of an MD5 is none.

        Raises:
            SourceError: as for `objects`.
        """
        client = self._client()
        with self._translated():
            head = client.head_object(Bucket=self._bucket, Key=key)
        is_plain = head.get("ServerSideEncryption", "AES256") == "AES256"
        return not is_plain or "SSECustomerAlgorithm" in head

    def sign(self, key: str) -> str:
        """A URL that serves the object for SIGNED_S; not signed when there are no credentials.

        Raises:
            SourceError: as for `objects`.
        """
        client = self._client()
        where = {"Bucket": self._bucket, "Key": key}
        with self._translated():
            return str(client.generate_presigned_url("get_object", where, ExpiresIn=SIGNED_S))

    def close(self) -> None:
        """Closes idle connections; the store can still be used."""
        if self._made is not None:
            self._made.close()

    def _client(self) -> Any:
        with self._lock:
            if self._made is None:
                with self._translated():
                    self._made = _make_client(self._settings)
            return self._made

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """boto3's errors as ours, one line each."""
        try:
            import boto3.exceptions
            import botocore.exceptions
        except ImportError:
            raise SourceError("s3:// needs boto3: pip install flashserve[s3]") from None
        try:
            yield
        except botocore.exceptions.ClientError as error:
            fault = error.response.get("Error", {})
            reason = f"{fault.get('Code', 'error')}: {fault.get('Message', '')}"
            raise SourceError(
                f"s3://{self._bucket}: the store answers {one_line(Exception(reason))}"
            ) from None
        except (
            botocore.exceptions.BotoCoreError,
            boto3.exceptions.Boto3Error,
            ValueError,
        ) as error:
            raise SourceError(f"s3://{self._bucket} cannot be read: {one_line(error)}") from None


def _ca_bundle(session: Any) -> str | None:
    """What boto3 is told to trust, or else what Python is: one answer for listing and reading."""
    named = session.get_config_variable("ca_bundle")
    return named or os.environ.get("SSL_CERT_FILE") or None


def _make_client(settings: StoreSettings) -> Any:
    import boto3
    import botocore
    import botocore.config
    import botocore.session

    core = botocore.session.get_session()
    session = boto3.Session(botocore_session=core)
    timeout_s = min(_MAX_TIMEOUT_S, settings.remote_timeout_s)
    has_credentials = session.get_credentials() is not None
    config = botocore.config.Config(
        signature_version="s3v4" if has_credentials else botocore.UNSIGNED,
        connect_timeout=timeout_s,
        read_timeout=timeout_s,
        retries={"total_max_attempts": settings.remote_retries + 1, "mode": "standard"},
    )
    return session.client("s3", config=config, verify=_ca_bundle(core))
