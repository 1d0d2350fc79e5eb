"""What becomes of the copies on disk behind the loads: mended, completed, given up."""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.integration.store.test_tiers import FakeRemote, Recorder, running, spec

from flashserve.store import origin
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.disk import fsck as fscking
from flashserve.store.disk.fsck import fsck
from flashserve.store.disk.tier import DiskTier
from flashserve.types import ModelId, Tier

pytestmark = pytest.mark.integration

ONE, TWO = ModelId("one"), ModelId("two")
URIS = {ONE: "s3://bucket/one", TWO: "s3://bucket/two"}
SHARED, OWN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def remotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[ModelId, FakeRemote]:
    """Two checkpoints, whose first shards are the same file at their source."""
    blobs = tmp_path / "hub" / "blobs"  # laid out as a hub's cache is: links may lead there
    blobs.mkdir(parents=True)
    draw = np.random.default_rng(0)
    shard = {"a.weight": draw.integers(0, 256, 2 * CHUNK_BYTES + 4321, np.uint8)}
    safetensors.numpy.save_file(shard, blobs / "shared")
    found = {}
    for model_id, uri in URIS.items():
        directory = tmp_path / "hub" / "snapshots" / model_id
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"name": model_id}))
        (directory / SHARED).symlink_to(blobs / "shared")
        own = {"b.weight": draw.integers(0, 256, CHUNK_BYTES + 77, np.uint8)}
        safetensors.numpy.save_file(own, blobs / model_id)
        (directory / OWN).symlink_to(blobs / model_id)
        index = {"weight_map": {"a.weight": SHARED, "b.weight": OWN}}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        found[model_id] = FakeRemote(uri, directory)
    by_uri = {remote.uri: remote for remote in found.values()}
    monkeypatch.setattr(origin, "open_source", lambda uri, *_: by_uri[uri])
    return found


class Waiting(Recorder):
    """Tells a test when so many calls have come."""

    def __init__(self) -> None:
        super().__init__()
        self.changed = threading.Condition()

    def on_disk(self, *call) -> None:
        with self.changed:
            super().on_disk(*call)
            self.changed.notify_all()

    def wait_on_disk(self, *models: ModelId) -> None:
        with self.changed:
            self.changed.wait_for(
                lambda: set(models) <= {call[1] for call in self.calls if call[0] == "on_disk"}
            )


def stage(store, model_id: ModelId, tier: Tier = Tier.DRAM) -> int:
    return store.stage(spec(model_id, URIS[model_id]), tier).num_bytes


def flip(path: Path, *positions: int) -> None:
    with path.open("r+b") as file:
        for position in positions:
            byte = os.pread(file.fileno(), 1, position)[0]
            os.pwrite(file.fileno(), bytes([byte ^ 8]), position)


def on_disk(store, model_id: ModelId) -> Path:
    stored = store._origins.on_disk(URIS[model_id])
    assert stored is not None
    return stored.directory


def assert_equal(directory: Path, remote: FakeRemote) -> None:
    for path in remote.directory.iterdir():
        assert (directory / path.name).read_bytes() == path.read_bytes(), path.name


def assert_fsck_finds_nothing(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "data" / "store", 1 << 30)
    try:
        report = fsck(tier)
    finally:
        tier.close()
    assert report.problems == report.set_aside == ()
    assert report.num_resumable == 0


def test_damage_that_a_load_finds_on_disk_is_mended_behind_it(tmp_path, remotes, caplog):
    remote = remotes[ONE]
    with running(tmp_path) as store:
        stage(store, ONE, Tier.DISK)
        path = on_disk(store, ONE) / SHARED
        flip(path, 5, CHUNK_BYTES - 1, 2 * CHUNK_BYTES + 9)
        flip(on_disk(store, ONE) / OWN, CHUNK_BYTES + 1)
        stage(store, ONE)
        assert image_of(store, ONE) == files_of(remote)
        store.evict(ONE, Tier.DRAM)
        assert_equal(on_disk(store, ONE), remote)
        remote.is_up = False
        stage(store, ONE)
        assert image_of(store, ONE) == files_of(remote)
    lines = [each.getMessage() for each in caplog.records if "mended" in each.getMessage()]
    end = (remote.directory / SHARED).stat().st_size
    assert lines[0] == (
        f"bytes 0-{CHUNK_BYTES}, {2 * CHUNK_BYTES}-{end} of {path} were damaged on disk, and are "
        "mended"
    )
    assert len(lines) == 2
    assert_fsck_finds_nothing(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS])
def test_a_copy_that_cannot_be_mended_is_not_served(tmp_path, remotes, monkeypatch, caplog, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    with running(tmp_path) as store:
        store.listener = listener = Recorder()
        stage(store, ONE, Tier.DISK)
        flip(on_disk(store, ONE) / SHARED, 5)
        monkeypatch.setattr(fscking, "rewrite", refuse)
        if code == errno.EROFS:
            monkeypatch.setattr(store._origins.disk.index, "quarantine", refuse)
        stage(store, ONE)
        assert image_of(store, ONE) == files_of(remotes[ONE])
        store.evict(ONE, Tier.DRAM)
        assert listener.calls == [("left_disk", ONE)]
        assert store.tier(spec(ONE, URIS[ONE])) is Tier.REMOTE
        stage(store, ONE)
        assert image_of(store, ONE) == files_of(remotes[ONE])
    (line,) = [each for each in caplog.records if each.levelno == logging.ERROR]
    assert f"{SHARED} were damaged on disk; the copy is not served" in line.getMessage()


def test_checkpoints_that_share_a_file_in_dram_are_both_whole_on_disk(tmp_path, remotes):
    with running(tmp_path) as store:
        store.listener = listener = Waiting()
        stage(store, ONE)
        stage(store, TWO)
        assert not any(name == SHARED for name, _ in remotes[TWO].reads)
        listener.wait_on_disk(ONE, TWO)
        for model_id, remote in remotes.items():
            assert_equal(on_disk(store, model_id), remote)
    with running(tmp_path) as store:
        for model_id, remote in remotes.items():
            remote.is_up = False
            stage(store, model_id)
            assert image_of(store, model_id) == files_of(remote)
    assert_fsck_finds_nothing(tmp_path)


def test_a_file_that_another_load_still_brings_is_waited_for(tmp_path, remotes):
    remotes[ONE].may_read.clear()
    with running(tmp_path) as store:
        store.listener = listener = Waiting()
        with store.hold(spec(ONE, URIS[ONE])), store.hold(spec(TWO, URIS[TWO])) as second:
            remotes[ONE].may_read.set()
            second.arrival.wait()
            listener.wait_on_disk(ONE, TWO)
        for model_id, remote in remotes.items():
            assert_equal(on_disk(store, model_id), remote)


def test_a_shared_file_that_does_not_come_leaves_what_can_be_resumed(tmp_path, remotes):
    remotes[ONE].may_read.clear()
    remotes[ONE].fails_at = CHUNK_BYTES
    with running(tmp_path) as store:
        with store.hold(spec(ONE, URIS[ONE])), store.hold(spec(TWO, URIS[TWO])):
            remotes[ONE].may_read.set()
        store.evict(TWO, Tier.DRAM)
    tier = DiskTier(tmp_path / "data" / "store", 1 << 30)
    assert tier.checkpoints() == []
    assert fsck(tier).is_clean
    tier.close()


def test_a_checkpoint_of_files_that_are_all_in_dram_comes_to_disk_too(tmp_path, remotes):
    with running(tmp_path) as store:
        store.listener = listener = Waiting()
        stage(store, ONE)
        listener.wait_on_disk(ONE)
        (remotes[TWO].directory / OWN).unlink()
        (remotes[TWO].directory / OWN).symlink_to(tmp_path / "hub" / "blobs" / ONE)
        assert stage(store, TWO) == 0
        listener.wait_on_disk(TWO)
        assert_equal(on_disk(store, TWO), remotes[TWO])
        assert remotes[TWO].reads == []


def test_what_another_checkpoint_has_on_disk_is_not_fetched_again(tmp_path, remotes):
    with running(tmp_path) as store:
        stage(store, ONE, Tier.DISK)
        stage(store, TWO, Tier.DISK)
        assert {name for name, _ in remotes[TWO].reads} == {OWN}
        inodes = {(on_disk(store, each) / SHARED).stat().st_ino for each in URIS}
        assert len(inodes) == 1
        assert_equal(on_disk(store, TWO), remotes[TWO])
        flip(on_disk(store, ONE) / SHARED, 5)
        stage(store, TWO)
        store.evict(TWO, Tier.DRAM)
        for model_id, remote in remotes.items():
            assert_equal(on_disk(store, model_id), remote)
        store.evict(ONE, Tier.DISK)
        assert_equal(on_disk(store, TWO), remotes[TWO])
    assert_fsck_finds_nothing(tmp_path)


def image_of(store, model_id: ModelId) -> list[bytes]:
    with store.lease(model_id) as lease:
        sizes = [file.num_bytes for file in lease.snapshot.layout.files]
        return [
            bytes(store.arena._map[offset : offset + size])
            for (offset, _), size in zip(lease.extents, sizes, strict=True)
        ]


def files_of(remote: FakeRemote) -> list[bytes]:
    return [(remote.directory / name).read_bytes() for name in (SHARED, OWN)]
