"""What the cold-start benchmark makes of its samples."""

from __future__ import annotations

import contextlib
import pathlib

import pytest

import coldstart
from coldstart import PHASES, ROWS, Sample


def served(ttft_s: float, **actual: float) -> Sample:
    phases = dict.fromkeys(PHASES, 0.0)
    receipt = {"tier": "dram", "predicted": {**phases, "init_s": 0.5}, "actual": phases | actual}
    return Sample(ttft_s, receipt)


def test_a_row_has_the_receipts_phases_beside_the_clock() -> None:
    samples = [served(1.0, dram_s=0.2), served(3.0, dram_s=0.6), served(2.0, dram_s=0.4)]
    row = coldstart.report_row(32, "dram", samples)
    assert (row["prompt_tokens"], row["row"], row["tier"]) == (32, "dram", "dram")
    assert (row["median"], row["repeats"]) == (2.0, 3)
    assert (row["dram_s"], row["fetch_s"], row["predicted_s"]) == (0.4, 0.0, 0.5)


def test_a_process_without_a_receipt_has_the_same_columns() -> None:
    ours = coldstart.report_row(32, "s3", [served(1.0)])
    theirs = coldstart.report_row(32, "fresh process, s3", [Sample(9.0)])
    assert list(ours) == list(theirs)
    assert theirs["median"] == 9.0
    assert theirs["tier"] is theirs["predicted_s"] is theirs["fetch_s"] is None


def test_ratios_are_above_one_where_we_are_faster() -> None:
    seconds = {"warm": 0.1, "dram": 0.2, "s3": 1.0, "fresh process": 4.0}
    seconds |= {"disk, cold": 0.5, "disk, page cache": 0.4, "fresh process, s3": 8.0}
    assert set(seconds) == set(ROWS)
    of_rows = {row: [Sample(time)] for row, time in seconds.items()}
    assert coldstart.ratios({32: of_rows, 512: of_rows}) == {
        "fresh_process_over_dram_hit": 20.0,
        "fresh_process_over_disk": 8.0,
        "s3_fresh_process_over_dram_hit": 40.0,
        "s3_fresh_process_over_s3": 8.0,
        "warm_over_dram_hit": 0.5,
        "warm_over_dram_hit_512": 0.5,
    }


@pytest.mark.parametrize(
    ("row", "remote", "disk", "is_right"),
    [
        ("dram", 0, 0, True),
        ("dram", 0, 5, False),
        ("disk, cold", 0, 5, True),
        ("disk, cold", 0, 0, False),
        ("s3", 5, 0, True),
        ("s3", 0, 5, False),
        ("s3", 5, 5, False),
    ],
)
def test_a_row_whose_bytes_came_from_elsewhere_ends_the_run(
    row: str, remote: int, disk: int, *, is_right: bool
) -> None:
    before, after = {"remote": 10, "disk": 20}, {"remote": 10 + remote, "disk": 20 + disk}
    with contextlib.nullcontext() if is_right else pytest.raises(SystemExit, match=row):
        coldstart.check_reads(row, before, after)


def test_a_bit_changes_the_last_weight_alone(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"header" + bytes(4))
    (tmp_path / "config.json").write_text("{}")
    coldstart.flip_a_bit(tmp_path, 1)
    assert path.read_bytes() == b"header\x00\x00\x02\x00"
    assert (tmp_path / "config.json").read_text() == "{}"
