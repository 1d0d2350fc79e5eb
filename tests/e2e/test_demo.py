"""`make demo`, which is the first thing that anybody runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_the_demo_answers_from_every_tier_and_cleans_up(checkpoint: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flashserve.cli.demo", "--data-dir", str(checkpoint.parents[1])],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("first token after") == 4
    assert done.stdout.count("Paris") >= 4
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "are gone" in done.stdout
