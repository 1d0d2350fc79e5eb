from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashserve.config import StoreSettings
from flashserve.errors import InputError
from flashserve.store.calibration import (
    FILE_NAME,
    Calibration,
    calibrate_tiers,
    read_calibration,
    write_calibration,
)
from flashserve.store.checkpoint.listing import CHUNK_BYTES, FileReader, Listing, SourceFile
from flashserve.types import Tier


class Remote:
    """A source of three chunks that counts what is read of it."""

    uri = "s3://bucket/model"
    lowest_tier = Tier.REMOTE
    preferred_bytes = CHUNK_BYTES
    preferred_threads = 2

    def __init__(self) -> None:
        self.begins: list[int] = []
        self.is_closed = False

    def listing(self) -> Listing:
        small = SourceFile("config.json", 10, "a")
        return Listing(self.uri, "x", (small, SourceFile("weights", 3 * CHUNK_BYTES, "b")))

    def open(self, file: SourceFile) -> FileReader:
        assert file.name == "weights"
        return self

    def read(self, begin: int, target: memoryview) -> None:
        assert target.nbytes == CHUNK_BYTES
        self.begins.append(begin)

    def close(self) -> None:
        self.is_closed = True


def calibration(**changes: float) -> Calibration:
    rates = dict.fromkeys(("disk", "dram", "page_cache", "copy", "fault", "checksum"), 1e9)
    named = {f"{name}_bytes_per_s": rate for name, rate in rates.items()}
    return Calibration(measured_at="now", machine="here", num_bytes=1, **{**named, **changes})


def test_every_tier_is_measured_and_nothing_is_left_behind(tmp_path: Path) -> None:
    remote, steps = Remote(), list[str]()
    measured = calibrate_tiers(tmp_path, 2 * CHUNK_BYTES + 5, StoreSettings(), remote, steps.append)
    assert measured.num_bytes == 2 * CHUNK_BYTES
    assert measured.remote_bytes_per_s is not None
    assert sorted(remote.begins) == [0, CHUNK_BYTES]
    assert remote.is_closed
    assert {"disk", "remote: s3://bucket/model"} <= set(steps)
    assert measured.compute_at_once is not None
    assert 1 <= measured.compute_at_once <= len(os.sched_getaffinity(0))
    assert measured.load_compute_s_per_byte is not None
    assert measured.load_compute_s_per_byte > 0
    assert list(tmp_path.iterdir()) == []


def test_without_a_source_nothing_is_said_of_remote(tmp_path: Path) -> None:
    assert calibrate_tiers(tmp_path, 1, StoreSettings()).remote_bytes_per_s is None


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    assert read_calibration(tmp_path) is None
    write_calibration(tmp_path, calibration())
    newer = calibration(disk_bytes_per_s=3e9)
    assert write_calibration(tmp_path, newer) == tmp_path / FILE_NAME
    assert read_calibration(tmp_path) == newer
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"disk_bytes_per_s": 1}', "\xff", '{"a":' * 100_000],
)
def test_a_damaged_file_is_named_with_the_remedy(tmp_path: Path, text: str) -> None:
    (tmp_path / FILE_NAME).write_text(text, "latin-1")
    with pytest.raises(InputError, match=r"calibration\.json.*flashserve calibrate"):
        read_calibration(tmp_path)


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e18])
def test_a_rate_that_cannot_be_is_refused(tmp_path: Path, rate: float) -> None:
    write_calibration(tmp_path, calibration(disk_bytes_per_s=rate))
    with pytest.raises(InputError, match="disk_bytes_per_s"):
        read_calibration(tmp_path)


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        calibrate_tiers(tmp_path / "nowhere", CHUNK_BYTES, StoreSettings())
