"""A real disk that is full while a checkpoint is fetched: a small filesystem of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.integration.store.test_tiers import URI, FakeRemote, image, spec

from flashserve.config import StoreSettings
from flashserve.errors import FlashServeError
from flashserve.store import origin
from flashserve.store.store import Store
from flashserve.types import ModelId, Tier

pytestmark = pytest.mark.integration

MIB = 1 << 20
M = ModelId("m")
DISK_BYTES = 16 * MIB
MOUNT = 'mount -t tmpfs -o size=16m,mode=700 none "$1" && shift && exec "$@"'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint that is larger than the disk."""
    directory = tmp_path / "source"
    directory.mkdir()
    data = np.random.default_rng(0).integers(0, 256, DISK_BYTES + MIB, np.uint8)
    safetensors.numpy.save_file({"weight": data}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def run_on_a_small_disk(tmp_path: Path, source: Path) -> dict[str, Any]:
    """What the child below tells, with a disk that nobody else sees."""
    disk = tmp_path / "disk"
    disk.mkdir()
    alone = ["unshare", "-Urm", "sh", "-c", MOUNT, "sh", str(disk)]
    try:
        allowed = subprocess.run([*alone, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare here to mount a small filesystem with")
    if allowed.returncode:
        pytest.skip(f"no filesystem may be mounted here: {allowed.stderr.strip()}")
    done = subprocess.run(
        [*alone, sys.executable, "-m", __name__, str(disk), str(source)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_disk_that_is_full_keeps_no_model_from_dram(tmp_path: Path, source: Path) -> None:
    told = run_on_a_small_disk(tmp_path, source)
    assert told["is_right"]
    assert told["tier"] == "dram"
    assert told["disk_bytes"] == 0
    (line,) = told["lines"]
    root = tmp_path / "disk" / "data" / "store"
    assert line.startswith(f"{URI} is not kept on disk: the disk tier is full: {root}")
    assert told["used"] == 0
    assert told["left"] == []
    assert told["tier_after"] == "remote"
    assert f"the disk tier is full: {root}" in told["stage_to_disk"]
    assert "takes no more bytes" in told["not_a_byte_left"]


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def use_up_a_small_disk(disk: Path, source: Path) -> dict[str, Any]:
    remote = FakeRemote(URI, source)
    origin.open_source = lambda *_: remote
    logging.getLogger().addHandler(log := _Lines())
    store = Store(disk / "data", 64 * MIB, False, StoreSettings(scrub_bytes_per_s=0))
    try:
        store.stage(spec(), Tier.DRAM)
        resident = store.residents()[M]
        is_right = image(store) == (source / "model.safetensors").read_bytes()
        store.evict(M, Tier.DRAM)  # waits for what is written behind
        areas = [disk / "data" / "store" / name for name in ("checkpoints", "incoming", "trash")]
        told = {
            "is_right": is_right,
            "tier": resident.tier.label,
            "disk_bytes": resident.disk_bytes,
            "lines": list(log.lines),
            "used": store.disk_usage().used,
            "left": [str(path) for area in areas for path in area.iterdir()],
            "tier_after": store.tier(spec()).label,
            "stage_to_disk": failure_of(store, Tier.DISK),
        }
        remote.uri += "-next"  # what it has by now is another version
        (source / "config.json").write_text("[]  ")
        with (disk / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    break
        return told | {"not_a_byte_left": failure_of(store, Tier.DRAM)}
    finally:
        store.close()


def failure_of(store: Store, tier: Tier) -> str:
    try:
        store.stage(spec(), tier)
    except FlashServeError as error:
        return error.message
    return ""


if __name__ == "__main__":
    sys.stdout.write(json.dumps(use_up_a_small_disk(Path(sys.argv[1]), Path(sys.argv[2]))))
