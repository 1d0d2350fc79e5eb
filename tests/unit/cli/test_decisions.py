from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from flashserve.cli import decisions as command
from flashserve.errors import InputError

NOW = time.time()


def decided(at: float, action: str, model: str | None, node: str = "local") -> dict[str, Any]:
    reason = f"P(request in 61 s) 0.2: start 0.031 > idle 0.0007; 1 replica for 1 forecast {action}"
    return {"at": at, "action": action, "model_id": model, "node_id": node, "reason": reason}


FOUND = [
    decided(NOW, "StopReplica", "team/qwen3-32b-fp8"),
    decided(NOW - 1, "Stage", "b"),
    decided(NOW - 2, "StartReplica", "team/qwen3-32b-fp8"),
]
"""The newest first, as the server lists them."""


def run(monkeypatch: pytest.MonkeyPatch, found: list[dict[str, Any]], **arguments: Any) -> None:
    class FakeClient:
        def decisions(self, limit: int) -> list[dict[str, Any]]:
            return found[:limit]

        def models(self) -> list[dict[str, Any]]:
            return [{"name": "a"}, {"name": "b"}]

    @contextlib.contextmanager
    def connect(_: str | None) -> Iterator[FakeClient]:
        yield FakeClient()

    monkeypatch.setattr(command, "connect", connect)
    command.decisions(**{"name": None, "limit": 20, "as_json": False, **arguments})


def test_the_newest_decision_stands_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, FOUND)
    heading, *lines = capsys.readouterr().out.splitlines()
    assert heading.split() == ["time", "action", "model", "reason"]
    assert [line.split()[-1] for line in lines] == ["StartReplica", "Stage", "StopReplica"]
    assert [line.split()[1] for line in lines] == ["start", "stage", "stop"]


def test_one_model_is_told_from_the_others_before_the_limit_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, FOUND, name="team/qwen3-32b-fp8", limit=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == [FOUND[0]]
    run(monkeypatch, FOUND, name="b", limit=1, as_json=True)
    assert json.loads(capsys.readouterr().out) == [FOUND[1]]


def test_other_days_and_nodes_are_named_where_there_are_some(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    older = decided(NOW - 3 * 86_400, "Reject", None, "far")
    run(monkeypatch, [*FOUND, older])
    heading, first, *_ = capsys.readouterr().out.splitlines()
    assert heading.split() == ["time", "action", "model", "node", "reason"]
    day, _, action, model, node, *_ = first.split()
    assert (len(day), action, model, node) == (5, "reject", "-", "far")


@pytest.mark.parametrize(("name", "of"), [(None, ""), ("a", " of a")])
def test_nothing_decided_is_said_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str | None, of: str
) -> None:
    run(monkeypatch, [], name=name)
    said = capsys.readouterr().out
    assert said == f"nothing has been decided{of} since the server started\n"


def test_a_name_that_is_not_deployed_is_told_from_one_of_which_nothing_was_decided(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match="no model of that name is deployed; deployed: a, b"):
        run(monkeypatch, FOUND, name="bb")
