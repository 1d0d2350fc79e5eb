"""Training in a process of its own: what it brings, its bounds, and every way in which it ends."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from tests.unit.forecast.network.test_network import drawn_weights

from flashserve.errors import FlashServeError, InputError, UnavailableError
from flashserve.forecast.core import History
from flashserve.forecast.network import weights as files
from flashserve.live.training import Limits, Trained, tune_apart

pytestmark = pytest.mark.integration
NUM_HELD = 120


@pytest.fixture(autouse=True)
def own_temporary_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where trainings make their folders, so that a test sees what they leave."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    return directory


def timers(num_series: int = 12, num_minutes: int = 600) -> History:
    """Series that have a request every seventh minute, each from another minute on."""
    counts = np.zeros((num_series, num_minutes), np.float32)
    for row in range(num_series):
        counts[row, row % 7 :: 7] = 1
    counts[0, 200:260] = np.nan
    return History(tuple(map(str, range(num_series))), 29_000_000, counts)


def tune(code: str | None = None, limits: Limits | None = None) -> Trained:
    """A training; `code` in place of the real one, with the folder in `folder`."""
    options = {}
    if code is not None:
        head = "import sys, pathlib; folder = pathlib.Path(sys.argv[1])\n"
        options["command"] = (sys.executable, "-c", head + code)
    return asyncio.run(
        tune_apart(timers(), NUM_HELD, None, limits or Limits(), seed=1, **options)  # type: ignore[arg-type]
    )


def test_a_training_brings_weights_and_says_how_good_they_are(
    own_temporary_directory: Path,
) -> None:
    trained = tune()
    assert 0 < trained.new_loss < 9
    assert 0 < trained.old_loss < 9
    assert trained.weights.num_hidden > 0
    assert list(own_temporary_directory.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("sys.exit('no memory left')", "ended with status 1: no memory left"),
        ("import os; os.kill(os.getpid(), 9)", "ended with signal 9"),
        ("pass", "wrote no losses"),
        ("(folder / 'losses.json').write_text('[]')", "wrote no losses"),
        ("(folder / 'losses.json').write_text('{\"old\": 1, \"new\": 1}')", "cannot read"),
    ],
)
def test_a_training_that_dies_or_brings_nothing_says_so_in_one_line(
    own_temporary_directory: Path, code: str, reason: str
) -> None:
    with pytest.raises(FlashServeError, match=reason) as caught:
        tune(code)
    assert isinstance(caught.value, (UnavailableError, InputError))
    assert "\n" not in caught.value.message
    assert list(own_temporary_directory.iterdir()) == []


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    weights = drawn_weights()
    weights.gate_bias[:] = np.nan
    files.save(weights, tmp_path / "nan.npz")
    code = (
        "(folder / 'losses.json').write_text('{\"old\": 1, \"new\": 0.5}')\n"
        f"damaged = pathlib.Path({str(tmp_path / 'nan.npz')!r}).read_bytes()\n"
        "(folder / 'weights.npz').write_bytes(damaged)"
    )
    with pytest.raises(InputError, match="gate_bias is damaged"):
        tune(code)


def test_a_training_that_hangs_is_killed(own_temporary_directory: Path) -> None:
    with pytest.raises(UnavailableError, match="took over 0 s"):
        tune("import time; time.sleep(600)", Limits(wall_s=0.2))
    assert list(own_temporary_directory.iterdir()) == []


def test_cancelling_kills_the_process(own_temporary_directory: Path) -> None:
    code = "import time; (folder / 'began').write_text(''); time.sleep(600)"
    command = (
        sys.executable,
        "-c",
        "import sys, pathlib; folder = pathlib.Path(sys.argv[1])\n" + code,
    )

    async def run() -> None:
        task = asyncio.create_task(tune_apart(timers(), 9, None, Limits(), 1, command))
        async with asyncio.timeout(10):
            while not list(own_temporary_directory.glob("*/began")):  # noqa: ASYNC110, ASYNC240
                await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert list(own_temporary_directory.iterdir()) == []


def test_a_training_that_wants_too_much_memory_fails_alone() -> None:
    with pytest.raises(UnavailableError, match="its process ended with"):
        tune(limits=Limits(memory_bytes=64 << 20))


def test_a_training_whose_server_is_gone_ends_at_once() -> None:
    order = json.dumps({"settings": {}, "limit_s": 1, "parent_pid": 1})
    code = (
        f"(folder / 'order.json').write_text({order!r})\n"
        "from flashserve.forecast.network.tune import main; main(folder)"
    )
    with pytest.raises(UnavailableError, match="asked for this training has ended"):
        tune(code)


@pytest.mark.parametrize(
    ("old", "new", "is_better"), [(0.5, 0.4, True), (0.5, 0.5, False), (0.5, math.nan, False)]
)
def test_only_a_lower_loss_is_better(old: float, new: float, is_better: bool) -> None:
    assert Trained(drawn_weights(), old, new).is_better == is_better
