import os
import subprocess
import sys

import pytest

from flashserve.errors import CheckpointError, ForbiddenError, SourceError
from flashserve.store.sources.source import check_allowed, open_source
from flashserve.types import Tier


def test_a_directory_is_itself(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    source = open_source(str(tmp_path / "link"), tmp_path)
    assert source.directory() == tmp_path / "model"
    assert source.lowest_tier is Tier.DISK


def test_two_ways_to_one_directory_have_one_identity(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")
    direct, linked = (open_source(str(tmp_path / name), tmp_path) for name in ("model", "link"))
    assert direct.listing().identity == linked.listing().identity


def test_equal_directories_are_not_the_same_source(tmp_path, write_checkpoint):
    one, two = (write_checkpoint(tmp_path / name) for name in ("one", "two"))
    for path in (*one.iterdir(), *two.iterdir()):
        os.utime(path, ns=(0, 0))
    assert (
        open_source(str(one), tmp_path).listing().identity
        != open_source(str(two), tmp_path).listing().identity
    )


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_changes_the_identity(tmp_path, write_checkpoint, name):
    source = open_source(str(write_checkpoint(tmp_path)), tmp_path)
    before = source.listing().identity
    assert source.listing().identity == before
    status = (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert source.listing().identity != before


def test_a_file_that_is_no_part_of_the_model_does_not(tmp_path, write_checkpoint):
    source = open_source(str(write_checkpoint(tmp_path)), tmp_path)
    before = source.listing().identity
    (tmp_path / "notes.txt").write_text("x")
    assert source.listing().identity == before


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3:bucket", "s3://bucket/prefix"),
        ("s3:///prefix", "s3://bucket/prefix"),
        ("s3://bucket/a/../b", "s3://bucket/prefix"),
        ("s3://bucket/a//b", "s3://bucket/prefix"),
        ("s3://user@bucket/a", "s3://bucket/prefix"),
        ("s3://bucket/a\nb", "s3://bucket/prefix"),
        ("hf://", "hf://org/name"),
        ("hf://org/name/file", "hf://org/name"),
        ("hf://org/..", "hf://org/name"),
        ("hf://org/name@", "hf://org/name"),
        ("hf://org/name@../x", "hf://org/name"),
        ("hf://org/name?x=1", "hf://org/name"),
        ("demo:other", "demo:smollm2"),
        ("gs://bucket", "unknown scheme gs"),
        ("file:///tmp", "unknown scheme file"),
        ("", "empty"),
    ],
)
def test_other_addresses_are_refused_with_a_remedy(tmp_path, uri, reason):
    with pytest.raises(SourceError, match=reason):
        open_source(uri, tmp_path)


@pytest.mark.parametrize(
    "uri",
    ["s3://bucket/prefix", "S3://bucket/a/b/", "s3://bucket", "hf://org/name", "hf://gpt2@v1/x"],
)
def test_remote_sources_are_opened_without_asking_anybody(tmp_path, uri):
    source = open_source(uri, tmp_path)
    assert source.uri == uri
    assert source.lowest_tier is Tier.REMOTE


def test_clients_of_remote_sources_are_imported_when_they_are_needed():
    program = (
        "import sys, flashserve.store.sources.source; "
        "print([name for name in ('boto3', 'huggingface_hub', 'torch') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing", "does not exist"),
        ("file", "is not a directory"),
        ("file/below", "is not a directory"),
        ("nul\0", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("loop", "cannot be read"),
    ],
)
def test_what_is_no_directory_is_refused(tmp_path, path, reason):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    source = open_source(f"{tmp_path}/{path}", tmp_path)
    with pytest.raises(SourceError, match=reason) as caught:
        source.listing()
    assert len(caught.value.message) < 1000


def test_deploys_over_http_stay_below_the_roots(tmp_path):
    (tmp_path / "root/model").mkdir(parents=True)
    (tmp_path / "root/escape").symlink_to("..")
    roots = [tmp_path / "other", tmp_path / "root"]
    check_allowed(str(tmp_path / "root/model"), roots, [])
    check_allowed(str(tmp_path / "root/model/../model"), roots, [])
    check_allowed(str(tmp_path / "root/missing"), roots, [])
    for outside in ("root/../secret", "root/escape/secret", "rooted", "secret\0", ".", "x" * 5000):
        with pytest.raises(ForbiddenError, match=r"deploy\.roots"):
            check_allowed(f"{tmp_path}/{outside}", roots, [])


def test_a_relative_directory_is_resolved_before_it_is_judged(tmp_path, monkeypatch):
    (tmp_path / "root").mkdir()
    monkeypatch.chdir(tmp_path / "root")
    check_allowed("model", [tmp_path / "root"], [])
    with pytest.raises(ForbiddenError):
        check_allowed("../model", [tmp_path / "root"], [])


def test_a_root_may_itself_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to("real")
    check_allowed(str(tmp_path / "root/model"), [tmp_path / "root"], [])


def test_nothing_is_allowed_by_default(tmp_path):
    with pytest.raises(ForbiddenError):
        check_allowed(str(tmp_path), [], [])


def test_deploys_over_http_keep_to_the_schemes(tmp_path):
    check_allowed("demo:smollm2", [], ["demo"])
    for uri in ("demo:smollm2", "s3://bucket", "file:///etc", "S3:x"):
        with pytest.raises(ForbiddenError):
            check_allowed(uri, [tmp_path], ["hf"])


def test_the_demo_model_is_taken_from_the_data_directory(tmp_path, write_checkpoint, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    write_checkpoint(tmp_path / "models/smollm2")
    source = open_source("demo:smollm2", tmp_path)
    assert source.directory() == tmp_path / "models/smollm2"
    assert source.listing().identity


def test_a_failed_conversion_is_one_line(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho noise >&2\necho 'error: no such package' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(SourceError, match="demo:smollm2 cannot be made: no such package"):
        open_source("demo:smollm2", tmp_path).directory()


def test_a_listing_holds_weights_and_small_files_with_their_identities(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja", "merges.txt"):
        (tmp_path / name).write_text("{}")
    for name in ("notes.txt", "adapter.safetensors", "pytorch_model.bin", ".hidden.json"):
        (tmp_path / name).write_text("x")
    (tmp_path / "directory.json").mkdir()
    listing = open_source(str(tmp_path), tmp_path).listing()
    assert [file.name for file in listing.files] == [
        "chat_template.jinja",
        "config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer.model",
    ]
    for file in listing.files:
        assert file.num_bytes == (tmp_path / file.name).stat().st_size
    assert len({file.identity for file in listing.files}) == len(listing.files)


def test_only_the_shards_of_the_index_are_listed(tmp_path, write_checkpoint, two_shards):
    write_checkpoint(tmp_path, two_shards)
    (tmp_path / "model-00009-of-00009.safetensors").write_text("stray")
    names = [file.name for file in open_source(str(tmp_path), tmp_path).listing().files]
    assert names == ["config.json", *sorted(two_shards), "model.safetensors.index.json"]


def test_a_missing_shard_is_named(tmp_path, write_checkpoint, two_shards):
    write_checkpoint(tmp_path, two_shards)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors is missing"):
        open_source(str(tmp_path), tmp_path).listing()


def test_a_file_shared_by_two_revisions_of_a_hub_cache_has_one_identity(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path / "blobs")
    for revision in ("one", "two"):
        directory = tmp_path / "snapshots" / revision
        directory.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (directory / name).symlink_to(f"../../blobs/{name}")
    one, two = (
        open_source(str(tmp_path / "snapshots" / revision), tmp_path).listing()
        for revision in ("one", "two")
    )
    assert one.files == two.files


def test_a_file_is_read_as_it_was_listed(tmp_path, write_checkpoint):
    source = open_source(str(write_checkpoint(tmp_path)), tmp_path)
    file = next(file for file in source.listing().files if file.name == "config.json")
    reader = source.open(file)
    target = bytearray(file.num_bytes)
    reader.read(0, memoryview(target))
    reader.close()
    assert target == (tmp_path / "config.json").read_bytes()
    (tmp_path / "config.json").write_text("other")
    with pytest.raises(CheckpointError):
        source.open(file)
