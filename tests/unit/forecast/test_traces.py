"""Every publisher's format is read as minute counts; what is wrong is named with its line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashserve.errors import InputError
from flashserve.forecast import synthetic, traces
from flashserve.forecast.traces import Trace, read_trace

AZURE_HEADING = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(map(str, range(1, 1441)))


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def parquet(tmp_path: Path, **columns: object) -> Path:
    path = tmp_path / "trace.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def counts_of(trace: Trace) -> dict[str, list[float]]:
    return dict(zip(trace.history.names, trace.history.counts.tolist(), strict=True))


def azure_line(**at: int) -> str:
    return ",".join(["o", "a", "f", "timer"] + [str(at.get(f"m{m}", 0)) for m in range(1, 1441)])


def test_azure_functions_2019(tmp_path: Path) -> None:
    trace = read_trace(written(tmp_path, AZURE_HEADING, azure_line(m1=3, m1440=2)))
    assert trace.history.names == ("o/a/f",)
    assert trace.history.counts.shape == (1, 1440)
    assert (trace.history.counts[0, 0], trace.history.counts[0, -1]) == (3, 2)
    assert not trace.clients


def test_azure_functions_2021_arrive_before_they_end(tmp_path: Path) -> None:
    lines = ["app,func,end_timestamp,duration", "a,f,130,5", "a,f,121,2", "a,g,0.5,0.25"]
    trace = read_trace(written(tmp_path, *lines))
    assert counts_of(trace) == {"a/f": [0, 1, 1], "a/g": [1, 0, 0]}


def test_azure_llm_2023(tmp_path: Path) -> None:
    lines = [
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        "2023-11-16 18:17:03.9799600,374,44",
        "2023-11-16 18:18:59.9999999,396,109",
    ]
    trace = read_trace(written(tmp_path, *lines))
    assert counts_of(trace) == {"azure-llm": [1, 1]}
    assert trace.history.start == 28335977  # 2023-11-16 18:17 in minutes since 1970
    assert trace.cohorts() == ("llm",)


def test_burstgpt_has_a_series_for_each_model_and_kind(tmp_path: Path) -> None:
    lines = [
        "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type",
        "5,ChatGPT,472,18,490,Conversation log",
        "45,ChatGPT,1087,230,1317,API log",
        "118,ChatGPT,417,276,693,Conversation log",
    ]
    trace = read_trace(written(tmp_path, *lines))
    assert counts_of(trace) == {"ChatGPT/API log": [1, 0], "ChatGPT/Conversation log": [1, 1]}


def test_mooncake(tmp_path: Path) -> None:
    lines = [f'{{"timestamp": {at}, "input_length": 5, "hash_ids": [1]}}' for at in (0, 61000)]
    trace = read_trace(written(tmp_path, *lines))
    assert counts_of(trace) == {"mooncake": [1, 1]}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([AZURE_HEADING, azure_line(), "o,a,f,timer,1,2"], "line 3: 6 fields instead of 1444"),
        ([AZURE_HEADING, azure_line(m7=-1)], "line 2: counts are whole numbers"),
        ([AZURE_HEADING, azure_line(m7=10**12)], "line 2: counts are whole numbers"),
        ([AZURE_HEADING, azure_line().replace("0", "x", 1)], "line 2: .*'x'"),
        (["app,func,end_timestamp,duration", "a,f,1,nan"], "line 2: nan is no time"),
        (["app,func,end_timestamp,duration", "a,f,soon,1"], "line 2: .*'soon'"),
        (["app,func,end_timestamp,duration", "a,f,1"], "line 2: 3 fields instead of 4"),
        (["app,func,end_timestamp,duration"], "has no arrivals"),
        (["app,func,end_timestamp,duration", "a,f,1,0", "a,f,9e9,0"], "spans .* days"),
        (["TIMESTAMP,ContextTokens,GeneratedTokens", "noon,1,1"], "line 2: .*'noon'"),
        (["one,two", "1,2"], "line 1: no known format.*Log Type"),
        (['{"timestamp": 1}', '{"timestamp": "1"}'], "line 2: no number named timestamp"),
        (['{"timestamp": 1}', "{"], "line 2: "),
        (['{"timestamp": 1}', "[1]"], "line 2: no number named timestamp"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    tmp_path: Path, lines: list[str], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        read_trace(written(tmp_path, *lines))


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        read_trace(tmp_path / "absent")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(InputError, match="neither text nor parquet"):
        read_trace(tmp_path / "bytes")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(InputError, match="damaged"):
        read_trace(tmp_path / "cut.parquet")
    (tmp_path / "empty").touch()
    with pytest.raises(InputError, match="empty"):
        read_trace(tmp_path / "empty")


def test_functions_in_parquet_keep_their_weights(tmp_path: Path) -> None:
    path = parquet(
        tmp_path, func_id=["a", "b"], sample_weight=[3, 0], counts=[[0, 1], [2, 0]], total=[1, 2]
    )
    trace = read_trace(path)
    assert counts_of(trace) == {"a": [0, 1], "b": [2, 0]}
    assert trace.weights.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"func_id": ["a"], "sample_weight": [-1], "counts": [[1]]}, "row 1: its weight"),
        (
            {"func_id": ["a", "b"], "sample_weight": [1, 1], "counts": [[1], [1, 2]]},
            "row 2: 2 counts instead of 1",
        ),
        (
            {"func_id": ["a", "b"], "sample_weight": [1, 1], "counts": [[1], [-2]]},
            "row 2: a count is not",
        ),
        ({"minute": [0, None], "invocations": [1, 1]}, "row 2: no minute"),
        ({"t_s": [0.0, 1e300], "input_tokens": [1, 1], "output_tokens": [1, 1]}, "row 2: its time"),
        ({"day": [0], "requests": [1]}, "it counts days"),
        ({"colour": ["red"]}, "columns colour; known formats"),
    ],
)
def test_what_is_wrong_in_parquet_is_named_with_its_row(
    tmp_path: Path, columns: dict[str, list[object]], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        read_trace(parquet(tmp_path, **columns))


def servegen(tmp_path: Path, begin_s: int = 0) -> Path:
    """Client 0 has 30 requests in window 0, client 1 rests; nobody was watched in window 1."""
    return parquet(
        tmp_path,
        model=["m", "m", "m", "m", "m"],
        client=[0, 1, 0, 1, 0],
        window_s=[begin_s + second for second in (0, 0, 600, 600, 1200)],
        rate_rps=[0.05, 0.0, 0.0, 0.0, 2.0],
        iat_dist=["Gamma", None, None, None, "Weibull"],
        p1=[0.3, 0.0, 0.0, 0.0, 0.5],
        p2=[1.0, 0.0, 0.0, 0.0, 1.0],
    )


def test_drawn_arrivals_are_as_many_as_measured_and_gaps_are_unknown(tmp_path: Path) -> None:
    path = servegen(tmp_path)
    trace = read_trace(path, seed=1)
    counts = trace.history.counts
    assert counts.shape == (2, 30)
    assert counts[0, :10].sum() == 30
    assert counts[1, :10].sum() == 0
    assert np.isnan(counts[:, 10:20]).all()
    assert counts[0, 20:].sum() == 1200
    assert np.array_equal(counts, read_trace(path, seed=1).history.counts, equal_nan=True)
    assert not np.array_equal(counts, read_trace(path, seed=2).history.counts, equal_nan=True)


def test_a_later_part_of_a_trace_begins_where_its_windows_begin(tmp_path: Path) -> None:
    whole = read_trace(servegen(tmp_path), seed=1).history
    later = read_trace(servegen(tmp_path, begin_s=864_000), seed=1).history
    assert later.start == 14_400
    assert np.array_equal(whole.counts, later.counts, equal_nan=True)


def test_synthetic_cohorts_are_recognised() -> None:
    made = synthetic.functions(120, 2 * traces.DAY, seed=1)
    same = [is_one == was for is_one, was in zip(made.trace.cohorts(), made.cohorts, strict=True)]
    assert set(made.cohorts) == {"rare", "timer", "diurnal", "bursty"}
    assert np.mean(same) > 0.85
    active = (made.trace.history.counts > 0).mean(axis=1)
    assert 0.3 < np.mean(active <= 1 / 60) < 0.6  # published: 45 % at most once an hour


def test_synthetic_clients_rest_most_of_the_time() -> None:
    counts = synthetic.clients(40, 7 * traces.DAY, seed=1).trace.history.counts
    windows = counts.reshape(40, -1, 10).sum(axis=2)
    assert 0.45 < np.mean(windows == 0) < 0.75


def test_selecting_keeps_names_counts_and_weights_together() -> None:
    trace = synthetic.functions(4, 60, seed=1).trace
    part = trace.select(np.array([False, True, False, True]))
    assert part.history.names == (trace.history.names[1], trace.history.names[3])
    assert np.array_equal(part.history.counts, trace.history.counts[[1, 3]])
    assert len(part.weights) == 2
    assert part.before(30).history.counts.shape == (2, 30)
