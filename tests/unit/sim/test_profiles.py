from __future__ import annotations

from pathlib import Path

import pytest

from flashserve.errors import InputError
from flashserve.sim.profiles import THIS, load_profile
from flashserve.store.calibration import Calibration, write_calibration

RATES = ("disk", "dram", "page_cache", "copy", "fault", "checksum")


def calibrated(tmp_path: Path, compute_at_once: float | None) -> str:
    rates = {f"{name}_bytes_per_s": 2e9 for name in RATES}
    made = Calibration(
        measured_at="now",
        machine="here",
        num_bytes=1,
        compute_at_once=compute_at_once,
        load_compute_s_per_byte=compute_at_once and 5e-10,
        **rates,
    )
    write_calibration(tmp_path, made)
    return str(tmp_path)


def test_a_calibrated_machine_has_the_measured_rates_and_shares_its_cores(tmp_path: Path) -> None:
    profile = load_profile(calibrated(tmp_path, 1.4))
    assert profile.speeds.disk_bytes_per_s == 2e9
    assert profile.speeds.compute_at_once == 1.4
    assert profile.speeds.load_compute_s_per_byte == 5e-10
    assert profile.costs == THIS.costs


def test_a_calibration_of_an_earlier_version_says_nothing_of_cores(tmp_path: Path) -> None:
    profile = load_profile(calibrated(tmp_path, None))
    assert profile.speeds.compute_at_once == THIS.speeds.compute_at_once
    assert profile.speeds.load_compute_s_per_byte == 0.0


def test_a_profile_that_is_none_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8xh100"):
        load_profile(str(tmp_path))
