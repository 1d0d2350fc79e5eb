"""S3 sources against a real server."""

import contextlib
import hashlib
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
from tests.integration.store import objectstore

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.checkpoint.snapshot import read_snapshot
from flashserve.store.sources import s3client
from flashserve.store.sources.botoclients import CLIENTS, _make_client
from flashserve.store.sources.listed import ListedFiles
from flashserve.store.sources.s3client import Object
from flashserve.store.sources.source import open_source
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.fixture(scope="module")
def buckets(tmp_path_factory):
    root = tmp_path_factory.mktemp("buckets")
    write_checkpoint(root / "models/org/single", {"model.safetensors": 3 * CHUNK_BYTES + 12_345})
    write_checkpoint(root / "models/org/sharded", dict.fromkeys(SHARDS, 1000))
    write_checkpoint(root / "whole", {"model.safetensors": 1000})
    with objectstore.serving(root, root.with_suffix(".log")) as endpoint:
        yield root, endpoint


@pytest.fixture
def root(buckets, monkeypatch, tmp_path):
    """Where the buckets are; the environment is as a user of their server has it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", objectstore.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", objectstore.SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", buckets[1])
    return buckets[0]


def write_checkpoint(directory: Path, files: dict[str, int]) -> None:
    directory.mkdir(parents=True)
    placed = {}
    for number, (name, num_bytes) in enumerate(files.items()):
        data = np.frombuffer(random.Random(number).randbytes(num_bytes), np.uint8)
        safetensors.numpy.save_file({f"weight{number}": data}, directory / name)
        placed[f"weight{number}"] = name
    if list(files) != ["model.safetensors"]:
        index = {"weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_text("{}")
    (directory / "README.md").write_text("not ours")


def source_of(uri, tmp_path, **settings):
    return open_source(uri, tmp_path, StoreSettings(**{"remote_retries": 1, **settings}))


def content(source, file) -> bytes:
    """Read in preferred pieces."""
    reader = source.open(file)
    try:
        target = bytearray(file.num_bytes)
        for begin in range(0, file.num_bytes, reader.preferred_bytes):
            with memoryview(target)[begin : begin + reader.preferred_bytes] as piece:
                reader.read(begin, piece)
        return bytes(target)
    finally:
        reader.close()


def test_a_checkpoint_is_listed_and_read_as_it_is(root, tmp_path):
    source = source_of("s3://models/org/single/", tmp_path)
    listing = source.listing()
    names = [file.name for file in listing.files]
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    for file in listing.files:
        data = (root / "models/org/single" / file.name).read_bytes()
        assert content(source, file) == data
        assert file.digests == (("md5", hashlib.md5(data).hexdigest()),)
    assert source.listing() == listing


def test_a_source_opened_anew_reads_what_another_listed(root, tmp_path):
    listing = source_of("s3://models/org/single", tmp_path).listing()
    again = source_of("s3://models/org/single", tmp_path)
    assert content(again, listing.files[0]) == b'{"model_type": "llama"}'


def test_the_layout_is_read_by_ranges(root, tmp_path):
    for name in ("single", "sharded"):
        source = source_of(f"s3://models/org/{name}", tmp_path)
        listing = source.listing()
        files = ListedFiles(source, listing, tmp_path)
        found = read_snapshot(files, source.uri, listing.identity)
        assert found.layout == read_layout(root / "models/org" / name)
        assert found.config == {"model_type": "llama"}
        assert found.directory == tmp_path
        assert found.has_tokenizer
        assert found.identity == listing.identity


def test_a_bucket_may_be_a_checkpoint(root, tmp_path):
    source = source_of("s3://whole", tmp_path)
    assert "model.safetensors" in [file.name for file in source.listing().files]


def test_a_changed_object_changes_the_identity_and_is_not_read(root, tmp_path):
    write_checkpoint(root / "models/changing", {"model.safetensors": 1000})
    source = source_of("s3://models/changing", tmp_path)
    before = source.listing()
    config = before.files[0]
    (root / "models/changing/config.json").write_text('{"model_type": "other"}')
    with pytest.raises(CheckpointError, match=r"config\.json changed"):
        content(source, config)
    after = source.listing()
    assert after.identity != before.identity
    assert after.files[1] == before.files[1]
    with pytest.raises(CheckpointError, match=r"config\.json changed since it was listed"):
        source_of("s3://models/changing", tmp_path).open(config)


def test_an_object_that_vanishes_is_named(root, tmp_path):
    write_checkpoint(root / "models/vanishing", {"model.safetensors": 1000})
    source = source_of("s3://models/vanishing", tmp_path)
    file = source.listing().files[0]
    (root / "models/vanishing/config.json").unlink()
    with pytest.raises(SourceError, match=r"vanishing/config\.json does not exist .404 NoSuchKey"):
        content(source, file)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://nothing/here", "NoSuchBucket"),
        ("s3://models/nothing", "no object below s3://models/nothing/"),
        ("s3://models/org", "no object below"),
    ],
)
def test_what_is_not_there_is_refused(root, tmp_path, uri, reason):
    with pytest.raises(SourceError, match=reason):
        source_of(uri, tmp_path).listing()


def test_objects_without_weights_are_no_checkpoint(root, tmp_path):
    (root / "models/pickled").mkdir()
    (root / "models/pickled/pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        source_of("s3://models/pickled", tmp_path).listing()


def test_a_missing_shard_is_named(root, tmp_path):
    write_checkpoint(root / "models/partial", dict.fromkeys(SHARDS, 1000))
    (root / "models/partial" / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"partial/{SHARDS[1]} is missing"):
        source_of("s3://models/partial", tmp_path).listing()


@contextlib.contextmanager
def requests(settings) -> Iterator[list[str]]:
    """The methods of what boto3 asks, with these settings, in this process."""
    asked: list[str] = []

    def note(request, **_) -> None:
        asked.append(request.method)

    with CLIENTS.using(settings) as shared:
        shared.client.meta.events.register("before-send.s3", note)
        yield asked
        shared.client.meta.events.unregister("before-send.s3", note)


def test_a_start_lists_once_and_one_from_memory_asks_nobody(root, tmp_path):
    """Not even when there is nobody left to ask."""
    settings = StoreSettings(remote_retries=0, scrub_bytes_per_s=0, recheck_s=3600)
    model = ModelSpec(ModelId("m"), "s3://models/org/sharded", 0, Tier.REMOTE)
    store = Store(tmp_path / "data", 16 << 20, False, settings)
    with contextlib.closing(store), requests(settings) as asked:
        with store.hold(model) as lease:
            lease.arrival.wait()
        assert asked == ["GET", *["HEAD"] * 5]
        with store.hold(model) as lease:
            assert lease.arrival.wait().num_bytes == 0
        assert len(asked) == 6


def test_a_start_from_memory_outlives_its_server(root, tmp_path, monkeypatch):
    settings = StoreSettings(remote_retries=0, scrub_bytes_per_s=0, recheck_s=0)
    model = ModelSpec(ModelId("m"), "s3://models/org/sharded", 0, Tier.REMOTE)
    with contextlib.closing(Store(tmp_path / "data", 16 << 20, False, settings)) as store:
        with objectstore.serving(root, tmp_path / "log") as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            store.stage(model, Tier.DRAM)
        store.evict(model.model_id, Tier.REMOTE)
        with pytest.raises(SourceError):
            store.hold(model)
        with objectstore.serving(root, tmp_path / "log") as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            store.stage(model, Tier.DRAM)
        for _ in range(3):
            with store.hold(model) as lease:
                assert lease.arrival.wait().num_bytes == 0


def test_sources_of_one_environment_share_a_client(root, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(CLIENTS, "_make", lambda *kind: made.append(kind) or _make_client(*kind))
    for number in range(3):
        source = source_of("s3://models/org/single", tmp_path, remote_timeout_s=7.0)
        content(source, source.listing().files[0])
        assert len(made) == 1, number
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match="the store answers"):
        source_of("s3://models/org/single", tmp_path, remote_timeout_s=7.0).listing()


def test_wrong_credentials_are_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(SourceError, match="s3://models: the store answers") as caught:
        source_of("s3://models/org/single", tmp_path).listing()
    assert "\n" not in caught.value.message


def test_profiles_and_config_files_are_honoured(root, tmp_path, monkeypatch, buckets):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(
        f"[profile mine]\nregion = eu-test-1\nendpoint_url = {buckets[1]}\n"
    )
    (tmp_path / "credentials").write_text(
        f"[mine]\naws_access_key_id = {objectstore.KEY}\n"
        f"aws_secret_access_key = {objectstore.SECRET}\n"
    )
    monkeypatch.setenv("AWS_PROFILE", "mine")
    source = source_of("s3://models/org/single", tmp_path)
    assert content(source, source.listing().files[0]) == b'{"model_type": "llama"}'
    monkeypatch.setenv("AWS_PROFILE", "theirs")
    with pytest.raises(SourceError, match="theirs"):
        source_of("s3://models/org/single", tmp_path).listing()


def test_without_credentials_nothing_is_signed(root, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    store = s3client.ObjectStore("models", StoreSettings())
    assert store.sign("org/a b").endswith("/models/org/a%20b")


def test_without_an_endpoint_that_answers_the_error_is_one_line(root, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    with pytest.raises(SourceError, match="cannot be read: Could not connect") as caught:
        source_of("s3://models/org/single", tmp_path, remote_retries=0).listing()
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("elsewhere/config.json", "leads out"),
        ("org/x/../../config.json", "leads out"),
        ("org/x/a\\b.json", "no name for a file"),
        ("org/x/a\nb.safetensors", "no name for a file"),
        ("org/x/" + "a" * 300 + ".json", "no name for a file"),
    ],
)
def test_keys_that_climb_or_are_odd_are_refused(tmp_path, monkeypatch, key, reason):
    listed = [Object("org/x/model.safetensors", 8, "", "now"), Object(key, 8, "", "now")]
    monkeypatch.setattr(s3client.ObjectStore, "objects", lambda self, prefix: iter(listed))
    monkeypatch.setattr(s3client.ObjectStore, "endpoint", lambda self: "http://nowhere")
    with pytest.raises(SourceError, match=reason) as caught:
        source_of("s3://models/org/x", tmp_path).listing()
    assert "\n" not in caught.value.message


def test_without_boto3_the_remedy_is_named(tmp_path):
    program = (
        "import sys; sys.modules['boto3'] = None\n"
        "from pathlib import Path\n"
        "from flashserve.errors import SourceError\n"
        "from flashserve.store.sources.source import open_source\n"
        "try:\n    open_source('s3://bucket/prefix', Path()).listing()\n"
        "except SourceError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "s3:// needs boto3: pip install flashserve[s3]\n"
