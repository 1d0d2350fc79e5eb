from __future__ import annotations

import pytest
import torch
from torch import nn

from flashserve.engine.attention import AttentionStep, Slots, Span, attend, paged_attention, write
from flashserve.errors import UnsupportedModelError

HEADS, KV_HEADS, SIZE = 6, 2, 8
SCATTERED = torch.tensor([3, 2, 9, 8, 15, 14, 4, 5, 0, 1])


def plain_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    begin: int,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """The definition, one row and one head at a time. query: [rows, heads, size]."""
    output = torch.empty_like(query)
    for row in range(len(query)):
        last = begin + row
        first = max(0, last + 1 - window) if window else 0
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = keys[first : last + 1, shared] @ query[row, head] * 0.5
            if softcap:
                scores = torch.tanh(scores / softcap) * softcap
            output[row, head] = scores.softmax(0) @ values[first : last + 1, shared]
    return output


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("slots", [slice(5, 15), SCATTERED], ids=["neighbours", "scattered"])
@pytest.mark.parametrize(("begin", "end"), [(0, 10), (0, 1), (6, 10), (9, 10), (0, 4)])
def test_a_span_attends_to_its_own_positions(
    begin: int, end: int, slots: Slots, window: int | None, softcap: float | None
) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.full((2, 16, 2, KV_HEADS, SIZE), 1e4)  # whatever else is read shows
    kv = torch.randn(end, 2, KV_HEADS, SIZE, generator=generator)
    query = torch.randn(end - begin + 2, HEADS, SIZE, generator=generator)
    places = torch.arange(16)[slots][:end]
    pool[1, places[:begin]] = kv[:begin]
    written = slice(5 + begin, 5 + end) if isinstance(slots, slice) else places[begin:]
    step = AttentionStep(pool, [Span(pool, 0, begin, end, slots)], written)
    padded = torch.cat((kv[begin:], torch.zeros(2, 2, KV_HEADS, SIZE)))
    write(step, 1, padded)
    found = attend(step, 1, query, 0.5, window, softcap)
    expected = plain_attention(query[:-2], kv[:, 0], kv[:, 1], begin, window, softcap)
    torch.testing.assert_close(found[:-2], expected)
    assert not found[-2:].any()
    assert (pool[0] == 1e4).all()


def test_an_argument_that_would_be_ignored_is_refused_by_name() -> None:
    empty = torch.empty(1, HEADS, 1, SIZE)
    step = AttentionStep(torch.empty(0), [], slice(0, 1))
    with pytest.raises(UnsupportedModelError, match="Linear passes s_aux"):
        paged_attention(
            nn.Linear(1, 1),
            empty,
            empty,
            empty,
            None,
            scaling=1.0,
            flashserve_step=step,
            s_aux=torch.zeros(1),
        )
