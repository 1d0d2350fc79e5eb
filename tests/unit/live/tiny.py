"""A tokenizer that needs no file: one token per byte."""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from flashserve.live.chat import ChatTemplate
from flashserve.live.text import ModelText

END = 257
TEMPLATE = "{% for m in messages %}<|im|>{{ m.content }}{% endfor %}"


def byte_tokenizer() -> tokenizers.Tokenizer:
    """One token per byte (id: rank of its stand-in), then <|im|> (256) and <|end|> (257)."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im|>", "<|end|>"])
    return tokenizer


def byte_text(*, chat: bool = False) -> ModelText:
    template = ChatTemplate(TEMPLATE, {}, "here") if chat else None
    return ModelText("tiny", byte_tokenizer(), template)


def write_text(directory: Path, *, chat: bool = False) -> None:
    """The files of a checkpoint that say how its text is read."""
    directory.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    if chat:
        (directory / "chat_template.jinja").write_text(TEMPLATE)
