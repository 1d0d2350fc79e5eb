"""Whether a request fits the context."""

from __future__ import annotations

import pytest

from flashserve.errors import ContextLengthError, InputError
from flashserve.live.fitting import fit_max_tokens, kv_room_tokens


def test_what_fits_is_generated_as_asked() -> None:
    assert fit_max_tokens(90, 10, context_tokens=100, room_tokens=1000) == 10


def test_one_token_too_many_is_refused_with_all_numbers() -> None:
    with pytest.raises(ContextLengthError, match=r"90 tokens and max_tokens is 11.*101.*100"):
        fit_max_tokens(90, 11, context_tokens=100, room_tokens=1000)


def test_without_a_wish_the_rest_of_the_context_is_used() -> None:
    assert fit_max_tokens(90, None, context_tokens=100, room_tokens=1000) == 10


def test_without_a_wish_the_memory_for_keys_and_values_is_a_limit_too() -> None:
    assert fit_max_tokens(30, None, context_tokens=100, room_tokens=48) == 19
    assert fit_max_tokens(60, None, context_tokens=100, room_tokens=48) == 1


@pytest.mark.parametrize("max_tokens", [1, None])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(
    max_tokens: int | None,
) -> None:
    with pytest.raises(ContextLengthError, match=r"prompt has 100 tokens.*of 100 tokens"):
        fit_max_tokens(100, max_tokens, context_tokens=100, room_tokens=1000)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        fit_max_tokens(0, 1, context_tokens=100, room_tokens=1000)


def test_memory_counts_in_whole_blocks() -> None:
    assert kv_room_tokens(kv_bytes=1000, kv_bytes_per_token=10, block_tokens=16) == 96
