"""The real traces, where they are: FLASHSERVE_TRACES, or the folder beside the clone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from flashserve.errors import InputError
from flashserve.forecast import backtest, registry
from flashserve.forecast.decisions import fixed_threshold
from flashserve.forecast.summary import cost_ratio
from flashserve.forecast.traces import read_trace

_BESIDE = Path(__file__).resolve().parents[4] / "shared" / "traces"
TRACES = Path(os.environ.get("FLASHSERVE_TRACES", _BESIDE))

WITHOUT_MINUTES = {
    "burstgpt_daily",
    "gentd26_load_latency",
    "gentd26_qps",
    "servegen_client_lengths",
}

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not TRACES.is_dir(), reason="no real traces: set FLASHSERVE_TRACES"),
]


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.parquet")), ids=lambda path: path.stem)
def test_every_file_is_read_or_refused_with_a_reason(path: Path) -> None:
    if path.stem in WITHOUT_MINUTES:
        with pytest.raises(InputError, match="cannot be forecast: it "):
            read_trace(path)
        return
    trace = read_trace(path)
    known = trace.history.counts[~np.isnan(trace.history.counts)]
    assert known.sum() > 0
    assert (known >= 0).all()
    assert len(trace.weights) == len(trace.history.names) == len(set(trace.history.names))


def file(name: str) -> Path:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"{name} is not among the traces")
    return path


def test_functions_keep_their_weights_and_totals() -> None:
    trace = read_trace(file("azure2019_functions_1day.parquet"))
    assert trace.history.counts.shape[1] == 1440
    rare = trace.history.counts.sum(axis=1) <= 20
    # Few distinct series stand for most functions of the population.
    assert trace.weights[rare].sum() > 0.3 * trace.weights.sum()
    assert rare.mean() < 0.1


def test_gaps_between_arrivals_decide_better_than_keeping_alive() -> None:
    trace = backtest.below(read_trace(file("azure2019_sample500_8h.parquet")), 1.0)
    parts = backtest.split(trace, halves=True)
    [model] = registry.make_models(["hazard"], 0)
    outcome = backtest.run_model(model, parts, [1]).at_threshold(fixed_threshold(10), parts.counts)
    assert cost_ratio(outcome, backtest.keep_alives(parts), 10, parts.future.weights) < 1
