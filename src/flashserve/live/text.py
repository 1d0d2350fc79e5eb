"""Text to token ids and back, in the server's own process: no tensor library is needed for it.

The ids equal those of transformers' AutoTokenizer for checkpoints with a tokenizer.json.
"""

from __future__ import annotations

import asyncio
import collections
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from flashserve.errors import ChatTemplateError, CheckpointError, InputError, SourceError
from flashserve.live.chat import ChatTemplate, read_chat_template, read_json

INLINE_CHARACTERS = 2000
"""Longer texts are tokenised in a thread, so that the event loop never waits a millisecond."""
_MAX_LOADED = 64


class ModelText:
    """The tokenizer and the chat template of one model. Thread-safe."""

    def __init__(
        self, name: str, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.name = name
        self.tokenizer = tokenizer
        self._template = template
        self._added = {
            token_id: token.content
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._byte_level = _is_byte_level(tokenizer)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a plain prompt, with the special tokens that the tokenizer adds by itself.

        Raises:
            InputError: the text is not valid Unicode.
        """
        return self._ids(text, "prompt", add_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        """The ids of a conversation; the template alone places special tokens.

        Raises:
            ChatTemplateError: the model has no chat template.
            InputError: the template refuses the messages, or they are not valid Unicode.
        """
        if self._template is None:
            raise ChatTemplateError(
                f"model {self.name} has no chat template; use /v1/completions with a plain prompt",
                param="messages",
            )
        return self._ids(self._template.render(messages), "messages", add_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, which may be a part of a character."""
        if token_id in self._added:
            return self._added[token_id].encode()
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return b"".join(
                bytes([_BYTE_OF[char]]) if char in _BYTE_OF else char.encode() for char in token
            )
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        return token.replace("\u2581", " ").encode()

    def _ids(self, text: str, param: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            return tuple(self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)
        except TypeError:  # the library takes a str that UTF-8 cannot write for something else
            raise InputError(
                "the text is not valid Unicode: it has half of a surrogate pair", param=param
            ) from None


def load_text(name: str, directory: Path) -> ModelText:
    """Read a checkpoint's tokenizer and chat template (some 0.2 s; blocking).

    Raises:
        SourceError: the directory is not there any more.
        CheckpointError: there is no tokenizer.json, or a file is damaged.
    """
    if not directory.is_dir():
        raise SourceError(f"model {name}: its directory {directory} is not there any more")
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(
            f"model {name}: {directory} has no tokenizer.json; save the tokenizer with"
            " transformers' save_pretrained"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(f"{file} is not a tokenizer: {error}") from None
    template = read_chat_template(directory, read_json(directory / "tokenizer_config.json"))
    return ModelText(name, tokenizer, template)


class TextCache:
    """The tokenizers in use, least recently used out first; one load for all who wait for it."""

    def __init__(
        self, max_loaded: int = _MAX_LOADED, load: Callable[[str, Path], ModelText] = load_text
    ) -> None:
        self._max_loaded = max_loaded
        self._load = load
        self._loads: collections.OrderedDict[tuple[str, Path, str], asyncio.Task[ModelText]]
        self._loads = collections.OrderedDict()

    async def get(self, name: str, directory: Path, identity: str) -> ModelText:
        """The model's text, loaded in a thread when it is not here yet.

        Raises:
            SourceError, CheckpointError: see load_text. The next call tries again.
        """
        key = (name, directory, identity)
        task = self._loads.get(key)
        if task is None:
            task = asyncio.create_task(asyncio.to_thread(self._load, name, directory))
            self._loads[key] = task
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            if len(self._loads) > self._max_loaded:
                self._loads.popitem(last=False)
        self._loads.move_to_end(key)
        return task.result() if task.done() else await asyncio.shield(task)

    def _forget_failure(self, key: tuple[str, Path, str], task: asyncio.Task[ModelText]) -> None:
        if (task.cancelled() or task.exception()) and self._loads.get(key) is task:
            del self._loads[key]


async def encode_prompt(
    text: ModelText, prompt: str | None, messages: Sequence[Mapping[str, Any]] | None
) -> tuple[int, ...]:
    """The ids of a prompt or of a conversation, in a thread when it is long.

    Raises:
        InputError, ChatTemplateError: see ModelText; or neither is given.
    """
    if messages is not None:
        num_characters = sum(len(str(message.get("content", ""))) for message in messages)
        if num_characters + 100 * len(messages) <= INLINE_CHARACTERS:
            return text.encode_chat(messages)
        return await asyncio.to_thread(text.encode_chat, messages)
    if prompt is None:
        raise InputError("a request needs a prompt or messages")
    if len(prompt) <= INLINE_CHARACTERS:
        return text.encode(prompt)
    return await asyncio.to_thread(text.encode, prompt)


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
    """Does the decoder read tokens as GPT-2's printable stand-ins for bytes?"""
    if tokenizer.decoder is None:
        return False
    state = json.loads(tokenizer.decoder.__getstate__())
    parts = state.get("decoders", [state])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_of() -> dict[str, int]:
    """GPT-2's stand-ins: printable bytes are themselves, the rest follow from U+0100 in order.

    Source: Radford et al. 2019, the byte-level BPE of GPT-2.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + position): byte for position, byte in enumerate(others)
    }


_BYTE_OF = _byte_of()
