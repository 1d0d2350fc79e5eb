from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flashserve.cli.main import app
from flashserve.errors import InputError
from flashserve.store.calibration import read_calibration


def test_the_figures_are_printed_and_kept(tmp_path: Path) -> None:
    arguments = ["calibrate", "--size", "8MiB", "--data-dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    printed = json.loads(result.stdout)
    kept = read_calibration(tmp_path)
    assert kept is not None
    assert printed["disk_bytes_per_s"] == kept.disk_bytes_per_s


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--size", "lots", "512MiB"),
        ("--size", "1MB", "8.0 MiB at least"),
        ("--source", "/models", "on this machine"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(
    tmp_path: Path, option: str, value: str, reason: str
) -> None:
    arguments = ["calibrate", option, value, "--data-dir", str(tmp_path)]
    with pytest.raises(InputError, match=reason):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert read_calibration(tmp_path) is None
