"""Does a request fit the model's context, and how many tokens may it generate?"""

from __future__ import annotations

from flashserve.errors import ContextLengthError, InputError


def fit_max_tokens(
    num_prompt_tokens: int, max_tokens: int | None, context_tokens: int, room_tokens: int
) -> int:
    """How many tokens to generate at most.

    Args:
        num_prompt_tokens: of the tokenised prompt.
        max_tokens: as the client gave it; None: what the context still holds.
        context_tokens: the model's.
        room_tokens: what a worker's KV memory holds; a limit only where nothing was asked for,
            because the engine itself refuses what it can never hold, and names the setting.

    Raises:
        InputError: the prompt is empty.
        ContextLengthError: it does not fit; the message names both numbers.
    """
    if num_prompt_tokens == 0:
        raise InputError("the prompt is empty", param="prompt")
    if num_prompt_tokens >= context_tokens:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens, but the model's context of"
            f" {context_tokens} tokens must hold it and at least one more"
        )
    left = context_tokens - num_prompt_tokens
    if max_tokens is None:
        return max(min(left, room_tokens - num_prompt_tokens + 1), 1)
    if max_tokens > left:
        raise ContextLengthError(
            f"the prompt has {num_prompt_tokens} tokens and max_tokens is {max_tokens}: together"
            f" {num_prompt_tokens + max_tokens}, over the model's context of {context_tokens}",
            param="max_tokens",
        )
    return max_tokens


def kv_room_tokens(kv_bytes: int, kv_bytes_per_token: int, block_tokens: int) -> int:
    """Tokens whose keys and values fit a worker's KV memory, in whole blocks."""
    return kv_bytes // (kv_bytes_per_token * block_tokens) * block_tokens
