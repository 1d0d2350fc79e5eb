"""An object store behind TLS, whose authority only this user trusts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.store import objectstore
from tests.unit.store.conftest import write_checkpoint

from flashserve.config import StoreSettings
from flashserve.errors import SourceError
from flashserve.store.sources.source import open_source

pytestmark = pytest.mark.integration

WEIGHT = np.arange(1000)
VARIABLES = ("AWS_CA_BUNDLE", "SSL_CERT_FILE")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The certificate of an authority that signed that of a store, which serves at its endpoint."""
    root = tmp_path_factory.mktemp("tls")
    ca, certificate = objectstore.make_certificates(root)
    write_checkpoint(root / "buckets" / "models" / "tiny", {"model.safetensors": {"w": WEIGHT}})
    with (
        pytest.MonkeyPatch.context() as patch,
        objectstore.serving(root / "buckets", root / "log", certificate=certificate) as endpoint,
    ):
        assert endpoint.startswith("https://")
        objectstore.configure(patch, endpoint, root)
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        yield ca


def read_header(tmp_path: Path) -> bytes:
    """A listing, through boto3, and a range, through our own connections."""
    source = open_source("s3://models/tiny", tmp_path, StoreSettings(remote_retries=0))
    weights = next(file for file in source.listing().files if file.name == "model.safetensors")
    reader = source.open(weights)
    data = bytearray(16)
    try:
        reader.read(0, memoryview(data))
    finally:
        reader.close()
    return bytes(data)


@pytest.mark.parametrize("variable", VARIABLES)
def test_either_variable_names_the_authority_for_listing_and_reading(
    authority: Path, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(authority))
    assert read_header(tmp_path)[8:10] == b'{"'


def test_the_aws_configuration_names_it_too(
    authority: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(f"[default]\nca_bundle = {authority}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    assert read_header(tmp_path)[8:10] == b'{"'


def test_an_authority_that_nobody_trusts_is_refused_with_the_remedy(
    authority: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match="certificate verify failed") as caught:
        read_header(tmp_path)
    assert "AWS_CA_BUNDLE" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("text", [None, "no certificate"], ids=["missing", "garbage"])
def test_a_file_without_certificates_is_named(
    authority: Path, text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle.pem"
    if text is not None:
        bundle.write_text(text)
    monkeypatch.setenv("AWS_CA_BUNDLE", str(bundle))
    with pytest.raises(SourceError, match=r"bundle\.pem") as caught:
        read_header(tmp_path)
    assert "\n" not in caught.value.message
