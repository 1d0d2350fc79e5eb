"""Turns token ids into text as they come, in whole characters."""

from __future__ import annotations

import tokenizers

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """The text of one completion.

    The concatenation of every `push` and the `flush` equals decoding all the ids at once, as far
    as text that has been given out can stay: a tokenizer with byte fallback turns bytes that it
    had accepted into replacement characters when an invalid one follows.

    Only the last few ids are decoded again for each new one. They start where the previous piece
    started, because a decoder treats the first token of a text in its own way. The decoder of
    `tokenizers` for streams does the same but raises in the case above, which any model can
    produce. To go on from another replica, push all of its ids again from the first: a decoder
    that starts inside a character gets it wrong.
    """

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        # ids[:num_old] began the previous piece and are decoded again for context only; num_given
        # characters of the text of `ids` have been given out.
        self._num_old = 0
        self._num_given = 0

    def push(self, token_id: int) -> str:
        """The text that is certain now; empty inside a character that takes several tokens."""
        self._ids.append(token_id)
        text = self._decode(self._ids)
        piece = text[self._num_given :]
        if not piece or piece.endswith(_INCOMPLETE):
            return ""
        self._ids = self._ids[self._num_old :]
        self._num_old = len(self._ids)
        self._num_given = len(self._decode(self._ids))
        return piece

    def flush(self) -> str:
        """What was withheld at the end: an incomplete character, as replacement characters."""
        text = self._decode(self._ids)
        piece = text[self._num_given :]
        self._num_given = max(self._num_given, len(text))
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
        return text
