import os
import time
from pathlib import Path

import pytest

from flashserve.errors import SourceError
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk.manifest import key_of
from flashserve.store.smallfiles import SmallFiles, sweep

DAY = 24 * 3600.0


def make(data_dir: Path, identity: str, age_s: float = 0.0) -> Path:
    files = (SourceFile("config.json", 2, "c"), SourceFile("model.safetensors", 9, "w"))
    listing = Listing("s3://b/m", identity, files)
    directory = SmallFiles(data_dir).directory(listing, lambda _: b"{}")
    os.utime(directory, (time.time() - age_s,) * 2)
    return directory


def test_small_files_are_read_once_and_weights_never(tmp_path):
    directory = make(tmp_path, "a", age_s=2 * DAY)
    assert [path.name for path in directory.iterdir()] == ["config.json"]

    def refuse(file):
        raise AssertionError(file)

    listing = Listing("s3://b/m", "a", (SourceFile("config.json", 2, "c"),))
    assert SmallFiles(tmp_path).directory(listing, refuse) == directory
    assert time.time() - directory.stat().st_mtime < DAY  # counts as used now


def test_a_read_that_fails_leaves_nothing(tmp_path):
    def fail(_):
        raise SourceError("gone")

    listing = Listing("s3://b/m", "a", (SourceFile("config.json", 2, "c"),))
    with pytest.raises(SourceError):
        SmallFiles(tmp_path).directory(listing, fail)
    assert list((tmp_path / "snapshots").iterdir()) == []


def test_only_what_is_old_not_deployed_and_not_on_disk_is_removed(tmp_path):
    deployed, on_disk, gone = (make(tmp_path, name, 2 * DAY) for name in ("d", "s", "g"))
    fresh = make(tmp_path, "f")
    (tmp_path / "store" / "checkpoints" / key_of("s")).mkdir(parents=True)
    half_made = tmp_path / "snapshots" / ".0123.partial"
    half_made.mkdir()
    os.utime(half_made, (0, 0))
    assert sweep(tmp_path, [deployed]) == 2
    assert set((tmp_path / "snapshots").iterdir()) == {deployed, on_disk, fresh}
    assert not gone.exists()
    assert sweep(tmp_path, [deployed], clock=lambda: time.time() + 2 * DAY) == 1
    assert not fresh.exists()


def test_a_data_directory_without_any_is_fine(tmp_path):
    assert sweep(tmp_path, []) == 0
