import os
import sys

import pytest

from flashserve.errors import ForbiddenError, SourceError
from flashserve.store.source import check_allowed, open_source
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
    assert direct.identity() == linked.identity()


def test_equal_directories_are_not_the_same_source(tmp_path, write_checkpoint):
    one, two = (write_checkpoint(tmp_path / name) for name in ("one", "two"))
    for path in (*one.iterdir(), *two.iterdir()):
        os.utime(path, ns=(0, 0))
    assert open_source(str(one), tmp_path).identity() != open_source(str(two), tmp_path).identity()


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_changed_file_changes_the_identity(tmp_path, write_checkpoint, name):
    source = open_source(str(write_checkpoint(tmp_path)), tmp_path)
    before = source.identity()
    assert source.identity() == before
    status = (tmp_path / name).stat()
    os.utime(tmp_path / name, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert source.identity() != before


def test_a_file_that_is_no_part_of_the_model_does_not(tmp_path, write_checkpoint):
    source = open_source(str(write_checkpoint(tmp_path)), tmp_path)
    before = source.identity()
    (tmp_path / "notes.txt").write_text("x")
    assert source.identity() == before


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("s3://bucket/prefix", "not available in this version"),
        ("S3://bucket/prefix", "not available in this version"),
        ("hf://org/name", "not available in this version"),
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
        source.identity()
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
    assert source.identity()


def test_a_failed_conversion_is_one_line(tmp_path, monkeypatch):
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho noise >&2\necho 'error: no such package' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(SourceError, match="demo:smollm2 cannot be made: no such package"):
        open_source("demo:smollm2", tmp_path).directory()
