"""Turns token ids into text as they come, in whole characters."""

from __future__ import annotations

import tokenizers
from tokenizers.decoders import DecodeStream


class Detokenizer:
    """The text of one completion.

    The concatenation of every `push` and the `flush` equals decoding all the ids at once. To go
    on from another replica, push all of its ids again from the first: a decoder that starts
    inside a character gets it wrong.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)
        self._ids: list[int] = []
        self._num_emitted = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty inside a character that takes several tokens."""
        self._ids.append(token_id)
        text: str = self._stream.step(self._tokenizer, token_id) or ""
        self._num_emitted += len(text)
        return text

    def flush(self) -> str:
        """What was withheld at the end: an incomplete character, as replacement characters."""
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=self._skip_special_tokens)
        rest = text[self._num_emitted :]
        self._num_emitted = len(text)
        return rest
