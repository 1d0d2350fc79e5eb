"""`flashserve fsck` as a command, on what was fetched from a real S3 server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import xxhash
from tests.integration.store import objectstore

from flashserve.config import StoreSettings
from flashserve.live.catalogue import Catalogue
from flashserve.live.modelrows import DeployedModel
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.disk.tier import DiskTier
from flashserve.store.sources.source import open_source
from flashserve.types import ModelId, ModelSpec, Tier

URI = "s3://models/org/m"
NUM_BYTES = 2 * CHUNK_BYTES + 4321


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory behind URI, served as a user of the server would reach it."""
    directory = tmp_path / "buckets" / "models" / "org" / "m"
    directory.mkdir(parents=True)
    data = np.frombuffer(random.Random(0).randbytes(NUM_BYTES), np.uint8)
    safetensors.numpy.save_file({"weight": data}, directory / "model.safetensors")
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name in [name for name in os.environ if name.startswith(("AWS_", "FLASHSERVE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", objectstore.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", objectstore.SECRET)
    monkeypatch.setenv("FLASHSERVE_STORE__REMOTE_RETRIES", "1")
    with objectstore.serving(tmp_path / "buckets", tmp_path / "log") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield directory


def fetch(data_dir: Path) -> Path:
    """Brings the checkpoint to disk; where its weights are."""
    source = open_source(URI, data_dir, StoreSettings())
    tier = DiskTier(data_dir / "store", 1 << 30)
    place = tier.begin(source.listing())
    for file in source.listing().files:
        reader = source.open(file)
        for index in range(file.num_chunks):
            begin = index * CHUNK_BYTES
            piece = bytearray(min(CHUNK_BYTES, file.num_bytes - begin))
            reader.read(begin, memoryview(piece))
            checksum = xxhash.xxh3_64_intdigest(piece)
            place.write_chunk(file.name, index, memoryview(piece), checksum)
        reader.close()
    path = place.complete().directory / "model.safetensors"
    tier.close()
    return path


def flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 1]))


def run_fsck(data_dir: Path) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "flashserve.cli.main", "fsck", "--json", "--data-dir", data_dir],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_bit_flipped_on_disk_is_fetched_again(bucket: Path, tmp_path: Path) -> None:
    path = fetch(tmp_path)
    flip(path, CHUNK_BYTES + 5)
    code, report = run_fsck(tmp_path)
    assert (code, report["is_clean"]) == (0, True)
    (problem,) = report["problems"]
    assert problem["uri"] == URI
    assert problem["ranges"] == [[CHUNK_BYTES, 2 * CHUNK_BYTES]]
    assert path.read_bytes() == (bucket / "model.safetensors").read_bytes()
    assert run_fsck(tmp_path)[1]["problems"] == []


def test_a_source_that_holds_another_version_by_now_repairs_nothing(
    bucket: Path, tmp_path: Path
) -> None:
    path = fetch(tmp_path)
    flip(path, 5)
    flip(bucket / "model.safetensors", NUM_BYTES // 2)
    os.utime(bucket / "model.safetensors", (1, 1))
    code, report = run_fsck(tmp_path)
    assert code == 1
    assert "changed since it was listed" in report["problems"][0]["what"]
    assert report["set_aside"] == [URI]
    assert not path.exists()


def test_small_files_that_nobody_needs_any_more_go(bucket: Path, tmp_path: Path) -> None:
    fetch(tmp_path)
    (on_disk,) = (tmp_path / "store" / "checkpoints").iterdir()
    for name in (on_disk.name, "0" * 32, "1" * 32):
        (tmp_path / "snapshots" / name).mkdir(parents=True)
        os.utime(tmp_path / "snapshots" / name, (0, 0))
    deploy(tmp_path, tmp_path / "snapshots" / ("1" * 32))
    code, report = run_fsck(tmp_path)
    assert code == 0
    assert report["removed"] == ["small files of 1 checkpoints, neither deployed nor on disk"]
    left = {path.name for path in (tmp_path / "snapshots").iterdir()}
    assert left == {on_disk.name, "1" * 32}


def deploy(data_dir: Path, directory: Path) -> None:
    """Has the catalogue say that a model with these small files is deployed."""

    async def put() -> None:
        catalogue = Catalogue(data_dir)
        await catalogue.open()
        spec = ModelSpec(ModelId("m"), "s3://models/org/other", 1, Tier.REMOTE)
        await catalogue.put(DeployedModel(spec, "identity", directory, 1, 0.0))
        await catalogue.close()

    asyncio.run(put())
