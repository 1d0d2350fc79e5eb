"""A small run of the scale benchmark has every figure."""

from __future__ import annotations

import scale
from flashserve.forecast import synthetic


def test_a_run_answers_all_and_times_each_event() -> None:
    trace = synthetic.functions(40, 240, seed=3).trace
    row = scale.run(trace, scale.Size(1, 5), scale.fitted(trace), "tiny")
    assert row["models"] == 10
    assert row["answered"] == row["requests"] > 0
    assert row["events"] > 2 * row["requests"]
    assert 0 < row["handle_us_mean"] / 1e3 <= row["handle_ms_max"]
    assert row["peak_gib"] > 0
