from __future__ import annotations

import functools

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from flashserve.engine.detokenize import Detokenizer

BYTE_TOKENS = sorted(pre_tokenizers.ByteLevel.alphabet())


@functools.cache
def byte_level() -> tokenizers.Tokenizer:
    """One token for each byte: every character of more bytes arrives in pieces."""
    vocabulary = {token: index for index, token in enumerate(BYTE_TOKENS)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer


@functools.cache
def byte_fallback() -> tokenizers.Tokenizer:
    """Pieces with a leading space as in Llama and Gemma, and bytes for the rest."""
    pieces = ["<unk>", "▁", "▁the", "▁a", "a", "b", "c", *(f"<0x{i:02X}>" for i in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def pieces_of(tokenizer: tokenizers.Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@pytest.mark.parametrize(
    "text",
    [
        "plain words",
        "👩‍👩‍👧‍👦 family",
        "日本語のテキスト",
        "مرحبا بالعالم",
        "naïve “quoted” café",
        "e\u0301",
    ],
)
def test_text_comes_in_whole_characters_and_complete(text: str) -> None:
    pieces = pieces_of(byte_level(), byte_level().encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert pieces[-1] == ""


def test_an_unfinished_character_comes_out_at_the_end() -> None:
    ids = byte_level().encode("ok 👋").ids[:-1]
    *pieces, tail = pieces_of(byte_level(), ids)
    assert "".join(pieces) == "ok "
    assert tail == byte_level().decode(ids)[3:] != ""


def test_special_tokens_are_skipped_unless_wanted() -> None:
    ids = [*byte_level().encode("a").ids, byte_level().token_to_id("<end>")]
    assert pieces_of(byte_level(), ids) == ["a", "", ""]
    shown = Detokenizer(byte_level(), skip_special_tokens=False)
    assert [shown.push(token) for token in ids] == ["a", "<end>"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, len(BYTE_TOKENS)), max_size=40))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids: list[int]) -> None:
    assert "".join(pieces_of(byte_level(), ids)) == byte_level().decode(ids)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="ab the日é👩\u200d💻", max_size=20))
def test_any_text_survives_byte_fallback(text: str) -> None:
    ids = byte_fallback().encode(text.replace(" ", "▁")).ids
    assert "".join(pieces_of(byte_fallback(), ids)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 262), max_size=30))
def test_after_any_garbage_text_goes_on(garbage: list[int]) -> None:
    ids = [*garbage, *byte_fallback().encode("▁the▁a").ids]
    assert "".join(pieces_of(byte_fallback(), ids)).endswith(" the a")
