"""What the loader benchmark makes of its samples."""

from __future__ import annotations

import random

import pytest

import loader
import served
from measured import Samples

PEER = next(row for row in loader.ROWS if row.is_peer and row.start == loader.COLD)
OTHER = next(row for row in loader.ROWS if row.loader == "tensorizer")
MEMORY = {"idle_rss": 10**8, "peak_rss": 6 * 10**8, "pss": 5 * 10**8}


def took(*seconds: float, **more: float) -> Samples:
    return Samples([{"resident_s": each, **MEMORY, **more} for each in seconds])


def failed(reason: str) -> Samples:
    return Samples(failures=[reason])


def measured(**given: Samples) -> dict[loader.Row, Samples]:
    """Samples for our rows (none unless given), for values that look at all of them."""
    rows = (loader.RAW, loader.OUR_DISK, loader.OUR_FRESH_DISK, *loader.OUR_COPIES)
    names = {"raw": loader.RAW, "disk": loader.OUR_DISK, "fresh": loader.OUR_FRESH_DISK,
             "copy": loader.OUR_COPIES[0], "copy_2": loader.OUR_COPIES[1]}  # fmt: skip
    return {row: Samples() for row in rows} | {names[name]: each for name, each in given.items()}


def test_ratios_are_of_medians_and_above_one_where_ours_is_faster() -> None:
    samples = {
        loader.BOTO3: took(7.0, 8.0, 30.0),
        loader.OUR_DRAM: took(0.04),
        loader.OUR_S3: took(2.0),
        PEER: took(3.0),
        OTHER: took(5.0),
        loader.RAW: took(1.0),
        loader.OUR_DISK: took(1.5),
    }
    ratios = loader.ratios(samples)
    assert ratios["s3_client_over_dram_ready"] == pytest.approx(200)
    assert ratios["s3_client_over_s3"] == pytest.approx(4)
    assert ratios["best_disk_peer_over_disk"] == pytest.approx(2)  # raw reading is no peer
    assert ratios["best_disk_peer_over_dram"] == pytest.approx(75)
    assert "s3_client_over_dram_copy" not in ratios


def test_a_row_that_failed_once_gives_no_ratio() -> None:
    broken = took(2.0)
    broken.failures.append("ValueError: 1 tensors are not what was written, first lm_head.weight")
    samples = {loader.BOTO3: took(8.0), loader.OUR_S3: broken}
    assert loader.ratios(samples) == {}


def test_a_peer_that_does_not_work_is_a_row_that_says_why() -> None:
    rows = loader.table("resident", "resident_s", {PEER: took(3.0), OTHER: failed("no CPU")}, 10**9)
    assert [(row["loader"], row["status"]) for row in rows] == [
        (PEER.name, "ok"),
        (OTHER.name, "no CPU"),
    ]
    assert rows[0]["gb_per_s"] == pytest.approx(1 / 3)
    assert rows[0].keys() == rows[1].keys()


def test_a_row_without_a_model_has_no_first_token() -> None:
    assert loader.table("first token", "first_token_s", {loader.RAW: took(1.0)}, 10**9) == []


def test_values_are_shares_of_the_same_runs_ceilings() -> None:
    samples = measured(
        raw=took(1.0, 1.2, 1.1),
        disk=took(1.25, 1.2, 1.3),
        copy=took(0.3, 0.2, memcpy_s=0.2, copy_s=0.25),
        copy_2=took(0.2, memcpy_s=0.1, copy_s=0.2),
        fresh=took(2.0),
    )
    values = loader.values(samples, num_bytes=4 * 10**8)
    assert values["disk_over_raw_odirect"]["value"] == pytest.approx(1.1 / 1.25)
    assert values["dram_copy_over_memcpy"]["value"] == pytest.approx(0.5)  # the worse of the two
    assert values["dram_copy_over_memcpy"]["met"] is False
    beyond = values["load_memory_beyond_checkpoint"]
    assert beyond["value"] == pytest.approx(10**8 / 2**20)
    assert beyond["met"] is True


def test_values_of_rows_that_did_not_run_are_absent() -> None:
    assert loader.values(measured(), num_bytes=1) == {}
    assert loader.served_values([], [], num_bytes=1) == {}


def test_rounds_hold_every_row_in_orders_of_their_own() -> None:
    rng = random.Random(1)
    first, second = (loader.round_of(loader.ROWS, rng) for _ in range(2))
    assert first != second
    for found in (first, second):
        assert {row: found.count(row) for row in loader.ROWS} == {
            row: 2 if row.start == loader.COLD else 1 for row in loader.ROWS
        }


def test_overlap_is_held_against_the_longer_of_load_and_prefill() -> None:
    slow, fast = served.RATES
    overlaps = [served.Overlap(slow, 2.2, 2.0, 1.0), served.Overlap(fast, 1.2, 0.5, 1.0)]
    values = loader.served_values(overlaps, [3 * 10**7], num_bytes=10**9)
    assert values["overlap_over_bound"]["value"] == pytest.approx(1.2)
    assert values["overlap_over_bound_1_gb_per_s"]["value"] == pytest.approx(1.1)
    assert values["replica_extra_memory"]["value"] == pytest.approx(0.03)
    assert values["replica_extra_memory"]["met"] is True
    rows = loader.overlap_rows(overlaps)
    assert len(rows) == 6
    assert rows[0].keys() == loader.table("", "resident_s", {PEER: took(1.0)}, 1)[0].keys()
