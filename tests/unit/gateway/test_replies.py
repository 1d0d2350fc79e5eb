from __future__ import annotations

import math

import msgspec
import pytest

from flashserve.gateway.feed import Pace
from flashserve.gateway.replies import ChatShape, CompletionShape, Wording, receipt_body
from flashserve.gateway.stream import join_choices
from flashserve.live.requests import Receipt, TextChunk, TokenLogprob
from flashserve.types import ModelId, Phases, RequestId, Tier


def encoded(value: object) -> object:
    return msgspec.json.decode(msgspec.json.encode(value))


@pytest.mark.parametrize("logprob", [-math.inf, math.nan, -1e30])
def test_logprobs_that_json_cannot_say_become_openais_lowest(logprob: float) -> None:
    token = TokenLogprob("a", b"a", logprob, (("b", b"b", logprob),))
    chunk = TextChunk(0, "a", 1, (token,))
    chat = encoded(ChatShape().piece(chunk))["logprobs"]["content"][0]
    assert (chat["logprob"], chat["top_logprobs"][0]["logprob"]) == (-9999.0, -9999.0)
    text = encoded(CompletionShape().piece(chunk))["logprobs"]
    assert (text["token_logprobs"], text["top_logprobs"]) == ([-9999.0], [{"b": -9999.0}])


def test_a_chunk_has_openais_fields_and_no_others() -> None:
    chunk = Wording(ChatShape(), "m", "r").chunk([ChatShape().piece(TextChunk(1, "hi", 1))])
    body = encoded(chunk)
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": "chatcmpl-r",
        "object": "chat.completion.chunk",
        "model": "m",
        "choices": [
            {"index": 1, "delta": {"content": "hi"}, "logprobs": None, "finish_reason": None}
        ],
    }


def test_choices_are_joined_from_interleaved_chunks() -> None:
    chunks = [
        TextChunk(1, "a", 1),
        TextChunk(0, "x", 1),
        TextChunk(1, "b", 1, finish_reason="stop"),
        TextChunk(0, "", 0, finish_reason="length"),
    ]
    zero, one = join_choices(chunks, 2)
    assert (zero.text, zero.finish_reason, zero.logprobs) == ("x", "length", None)
    assert (one.text, one.finish_reason) == ("ab", "stop")


def test_a_receipt_names_its_tier() -> None:
    receipt = Receipt(RequestId("r"), ModelId("m"), Tier.DRAM, False, Phases(), Phases(dram_s=1.0))
    body = receipt_body(receipt)
    assert body["tier"] == "dram"
    assert body["actual"]["dram_s"] == 1.0
    assert encoded(body) == body


def test_pace_is_the_time_of_the_tokens_after_the_first() -> None:
    pace = Pace()
    assert pace.tpot_s is None
    pace.note(TextChunk(0, "a", 3, emitted_at=10.0))
    assert pace.tpot_s is None
    pace.note(TextChunk(0, "b", 2, emitted_at=11.0))
    pace.note(TextChunk(0, "c", 2, emitted_at=12.0))
    pace.note(TextChunk(0, "", 0, emitted_at=99.0))
    assert pace.tpot_s == 0.5
