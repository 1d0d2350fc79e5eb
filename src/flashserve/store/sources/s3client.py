"""What is asked of boto3: to find configuration and credentials, to list, and to sign."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

from flashserve.config import StoreSettings
from flashserve.errors import SourceError, SourceUnavailableError
from flashserve.store.checkpoint.files import one_line
from flashserve.store.sources.botoclients import CLIENTS, Clients, Shared

SIGNED_S = 3600


class Object(NamedTuple):
    """etag is without quotes, empty where the store gives none."""

    key: str
    num_bytes: int
    etag: str
    modified: str


class ObjectStore:
    """A bucket as the usual environment and files configure it. Thread-safe; asks lazily."""

    def __init__(self, bucket: str, settings: StoreSettings, clients: Clients = CLIENTS) -> None:
        self._bucket = bucket
        self._settings = settings
        self._clients = clients

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Connections are kept between the questions that are asked meanwhile.

        Raises:
            SourceError: as for `objects`.
        """
        with contextlib.ExitStack() as stack:
            with self._translated():
                stack.enter_context(self._clients.using(self._settings))
            yield

    def endpoint(self) -> str:
        with self._client() as shared:
            return str(shared.client.meta.endpoint_url)

    def ca_bundle(self) -> str | None:
        """The file of certificates to trust, where the usual settings name one."""
        with self._client() as shared:
            return shared.ca_bundle

    def objects(self, prefix: str) -> Iterator[Object]:
        """Those whose keys start with `prefix` and have no further slash.

        Raises:
            SourceError: they cannot be listed, also for want of boto3 or of its configuration.
        """
        with self._client() as shared:
            paginator = shared.client.get_paginator("list_objects_v2")
            for page in paginator.paginate(Bucket=self._bucket, Prefix=prefix, Delimiter="/"):
                for each in page.get("Contents", ()):
                    etag = each.get("ETag", "").strip('"')
                    yield Object(each["Key"], each["Size"], etag, str(each.get("LastModified")))

    def is_encrypted(self, key: str) -> bool:
        """With a key of its own, so that an ETag in the form of an MD5 is none.

        Raises:
            SourceError: as for `objects`.
        """
        with self._client() as shared:
            head = shared.client.head_object(Bucket=self._bucket, Key=key)
        is_plain = head.get("ServerSideEncryption", "AES256") == "AES256"
        return not is_plain or "SSECustomerAlgorithm" in head

    def sign(self, key: str) -> str:
        """A URL that serves the object for SIGNED_S; not signed when there are no credentials.

        Raises:
            SourceError: as for `objects`.
        """
        where = {"Bucket": self._bucket, "Key": key}
        with self._client() as shared:
            signed = shared.client.generate_presigned_url("get_object", where, ExpiresIn=SIGNED_S)
        return str(signed)

    @contextlib.contextmanager
    def _client(self) -> Iterator[Shared]:
        with self._translated(), self._clients.using(self._settings) as shared:
            yield shared

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
        except botocore.exceptions.SSLError as error:
            trusted = self.ca_bundle() or "those that boto3 comes with"
            raise SourceError(
                f"s3://{self._bucket} cannot be read: {one_line(error)}; AWS_CA_BUNDLE names the "
                f"certificates to trust, now {trusted}"
            ) from None
        except botocore.exceptions.ClientError as error:
            fault = error.response.get("Error", {})
            reason = f"{fault.get('Code', 'error')}: {fault.get('Message', '')}"
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            kind = SourceUnavailableError if status >= 500 or status == 429 else SourceError
            raise kind(
                f"s3://{self._bucket}: the store answers {one_line(Exception(reason))}"
            ) from None
        except botocore.exceptions.HTTPClientError as error:
            raise SourceUnavailableError(
                f"s3://{self._bucket} does not answer: {one_line(error)}"
            ) from None
        except (
            botocore.exceptions.BotoCoreError,
            boto3.exceptions.Boto3Error,
            ValueError,
        ) as error:
            raise SourceError(f"s3://{self._bucket} cannot be read: {one_line(error)}") from None
