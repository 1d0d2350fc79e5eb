from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flashserve.cli.generate import answer_chunks, collect, text_of
from flashserve.errors import ChatTemplateError

CHAT = {"choices": [{"index": 0, "delta": {"content": "Par"}, "finish_reason": None}]}
COMPLETION = {"choices": [{"index": 0, "text": "is.", "finish_reason": "stop"}]}
LAST = {"choices": [], "usage": {"completion_tokens": 2}, "flashserve": {"tier": "dram"}}


class FakeClient:
    """Answers streams; chat only if the model has a template."""

    def __init__(self, *, has_template: bool) -> None:
        self.has_template = has_template
        self.calls: list[tuple[str, Mapping[str, Any]]] = []

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        self.calls.append((path, body))
        if path == "/v1/chat/completions" and not self.has_template:
            raise ChatTemplateError("no template")
        yield CHAT


def test_text_of_either_endpoint() -> None:
    assert text_of(CHAT) == "Par"
    assert text_of(COMPLETION) == "is."
    assert text_of({"choices": [{"delta": {"role": "assistant"}}]}) == ""
    assert text_of(LAST) == ""


def test_collect_joins_text_and_keeps_usage_and_receipt() -> None:
    assert collect(iter([CHAT, COMPLETION, LAST])) == {
        "text": "Paris.",
        "finish_reason": "stop",
        "usage": {"completion_tokens": 2},
        "receipt": {"tier": "dram"},
    }


def test_a_model_with_a_template_is_asked_by_chat() -> None:
    client = FakeClient(has_template=True)
    list(answer_chunks(client, "hi", {"model": "m"}))
    [(path, body)] = client.calls
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "hi"}]


def test_a_model_without_a_template_continues_the_prompt() -> None:
    client = FakeClient(has_template=False)
    assert list(answer_chunks(client, "hi", {"model": "m"})) == [CHAT]
    assert [path for path, _ in client.calls] == ["/v1/chat/completions", "/v1/completions"]
    assert client.calls[1][1]["prompt"] == "hi"
