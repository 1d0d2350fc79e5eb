"""Tokenising without a tensor library, and the cache of tokenizers."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import tokenizers
from tests.unit.live.tiny import TEMPLATE, byte_tokenizer, write_text
from tokenizers import decoders, models

from flashserve.errors import ChatTemplateError, CheckpointError, InputError, SourceError
from flashserve.live.text import INLINE_CHARACTERS, ModelText, TextCache, encode_prompt, load_text


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_text(tmp_path)
    return tmp_path


def test_every_byte_of_a_text_is_found_again_in_its_tokens(directory: Path) -> None:
    text = load_text("m", directory)
    written = "Grüße, 日本 \x00\t\U0001f469\u200d\U0001f680"
    ids = text.encode(written)
    assert len(ids) == len(written.encode())
    assert b"".join(text.token_bytes(i) for i in ids).decode() == written


def test_special_and_unknown_tokens_have_bytes_too(directory: Path) -> None:
    text = load_text("m", directory)
    assert text.token_bytes(256) == b"<|im|>"
    assert text.token_bytes(99_999) == b""


def test_sentencepiece_tokens_stand_for_a_space_and_for_single_bytes(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "\u2581Hi": 1, "<0xC3>": 2}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback()]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = load_text("m", tmp_path)
    assert text.token_bytes(1) == b" Hi"
    assert text.token_bytes(2) == b"\xc3"


def test_truncation_and_padding_saved_with_a_tokenizer_do_not_apply(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert len(load_text("m", tmp_path).encode("twelve bytes")) == 12


def test_chat_needs_a_template_and_says_so(directory: Path) -> None:
    text = load_text("tiny", directory)
    assert not text.has_chat_template
    with pytest.raises(ChatTemplateError, match="tiny has no chat template"):
        text.encode_chat([{"role": "user", "content": "x"}])


def test_special_tokens_of_a_template_become_single_tokens(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    ids = load_text("m", directory).encode_chat([{"role": "user", "content": "ab"}])
    assert ids[0] == 256
    assert len(ids) == 3


def test_half_a_surrogate_pair_is_a_bad_request(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    text = load_text("m", directory)
    with pytest.raises(InputError, match="not valid Unicode"):
        text.encode("a\ud800")
    with pytest.raises(InputError, match="not valid Unicode"):
        text.encode_chat([{"role": "user", "content": "\udc00"}])


def test_what_is_missing_or_damaged_is_named(directory: Path) -> None:
    with pytest.raises(SourceError, match="is not there any more"):
        load_text("m", directory / "gone")
    (directory / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        load_text("m", directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        load_text("m", directory)


def test_long_and_short_prompts_give_the_same_ids(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    text = load_text("m", directory)
    long = "ab" * INLINE_CHARACTERS

    async def scenario() -> None:
        assert await encode_prompt(text, long, None) == text.encode("ab") * INLINE_CHARACTERS
        chat = [{"role": "user", "content": long}]
        assert await encode_prompt(text, None, chat) == text.encode_chat(chat)
        assert await encode_prompt(text, "ab", None) == text.encode("ab")
        with pytest.raises(InputError, match="prompt or messages"):
            await encode_prompt(text, None, None)

    asyncio.run(scenario())


def test_a_tokenizer_is_loaded_once_for_all_who_wait_and_failures_are_not_kept(
    directory: Path,
) -> None:
    loads: list[str] = []

    def load(name: str, where: Path) -> ModelText:
        loads.append(name)
        return load_text(name, where)

    async def scenario() -> None:
        cache = TextCache(max_loaded=2, load=load)
        first, second = await asyncio.gather(*(cache.get("a", directory, "1") for _ in range(2)))
        assert first is second
        assert loads == ["a"]
        assert await cache.get("a", directory, "2") is not first
        await cache.get("a", directory, "1")
        await cache.get("b", directory, "1")
        loads.clear()
        assert await cache.get("a", directory, "1") is first
        assert loads == []
        await cache.get("a", directory, "2")
        assert loads == ["a"]

        gone = directory / "gone"
        with pytest.raises(SourceError):
            await cache.get("c", gone, "1")
        shutil.copytree(directory, gone)
        assert (await cache.get("c", gone, "1")).encode("x")

    asyncio.run(scenario())
