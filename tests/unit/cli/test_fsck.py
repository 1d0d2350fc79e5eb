from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import xxhash

from flashserve.cli import main as cli
from flashserve.errors import SourceError
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk.tier import DiskTier
from flashserve.store.refetching import Refetcher

DATA = b"weights" * 100


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """One with a checkpoint on disk, of which a bit is flipped."""
    tier = DiskTier(tmp_path / "store", 1 << 30)
    listing = Listing("s3://bucket/m", "m", (SourceFile("model.safetensors", len(DATA), "v1"),))
    place = tier.begin(listing)
    place.write_chunk("model.safetensors", 0, memoryview(DATA), xxhash.xxh3_64_intdigest(DATA))
    path = place.complete().directory / "model.safetensors"
    tier.close()
    path.write_bytes(DATA.replace(b"w", b"v", 1))
    return tmp_path


def run_fsck(monkeypatch: pytest.MonkeyPatch, data_dir: Path, *options: str) -> object:
    """The exit code."""
    monkeypatch.setattr(sys, "argv", ["flashserve", "fsck", "--data-dir", str(data_dir), *options])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


def answer(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(Refetcher, "__call__", lambda *_: data)


def test_damage_is_repaired_and_told(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, DATA)
    assert run_fsck(monkeypatch, data_dir) == 0
    printed = capsys.readouterr()
    told, summary = printed.out.splitlines()
    assert told.startswith("repaired: bytes 0-700 of ")
    assert "model.safetensors (from s3://bucket/m): differs from its checksums" in told
    assert summary == (
        "1 checkpoints checked (1 files, 700 B): 1 problems, 1 repaired, 0 checkpoints put aside"
    )
    assert printed.err == f"checking {data_dir / 'store'}: 700 B of 700 B\n"
    assert run_fsck(monkeypatch, data_dir) == 0


def test_damage_that_stays_fails_the_command(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object) -> bytes:
        raise SourceError("s3://bucket/m cannot be reached")

    monkeypatch.setattr(Refetcher, "__call__", unreachable)
    assert run_fsck(monkeypatch, data_dir) == 1
    out = capsys.readouterr().out
    assert out.startswith("damaged: bytes 0-700 of ")
    assert "s3://bucket/m cannot be reached" in out
    assert "1 checkpoints put aside" in out


def test_no_repair_asks_no_source_and_json_is_for_scripts(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(monkeypatch, DATA)
    assert run_fsck(monkeypatch, data_dir, "--no-repair", "--json") == 1
    report = json.loads(capsys.readouterr().out)
    assert not report["is_clean"]
    assert report["set_aside"] == ["s3://bucket/m"]
    (problem,) = report["problems"]
    assert problem["path"].endswith("/model.safetensors")
    assert problem["ranges"] == [[0, 700]]
    assert problem["is_repaired"] is False


def test_the_tier_of_a_running_server_is_left_alone(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tier = DiskTier(data_dir / "store", 1 << 30)
    assert run_fsck(monkeypatch, data_dir) == 1
    tier.close()
    error = capsys.readouterr().err
    assert "has the checkpoints in" in error
    assert error.count("\n") == 1


def test_a_data_directory_without_checkpoints_is_named_and_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_fsck(monkeypatch, tmp_path / "typo") == 1
    assert "nothing was fetched to disk there" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
