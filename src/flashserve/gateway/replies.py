"""What clients get: OpenAI's completion objects, whole and in pieces, and the receipt.

Structs of msgspec, because encoding them is what a stream spends its time on.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from typing import Any, Protocol

import msgspec
from msgspec import UNSET, Struct, UnsetType

from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.requests import ModelStatus, Receipt, TextChunk, TokenLogprob, Usage

_LOWEST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot say


class PromptDetails(Struct, frozen=True):
    cached_tokens: int


class UsageBody(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Envelope(Struct, frozen=True):
    """The outside of every completion object and chunk."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Struct]
    usage: UsageBody | UnsetType | None = UNSET
    flashserve: dict[str, Any] | UnsetType = UNSET


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None


class TopLogprob(Struct, frozen=True):
    token: str
    bytes: list[int]
    logprob: float


class ChatTokenLogprob(Struct, frozen=True):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatTokenLogprob]
    refusal: None = None


class Delta(Struct, frozen=True, omit_defaults=True):
    role: str | None = None
    content: str | None = None


class ChatChunkChoice(Struct, frozen=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatMessage(Struct, frozen=True):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class WholeChoice:
    """One choice after its last token."""

    index: int
    text: str
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str | None


class Shape(Protocol):
    """How one of the two endpoints words an answer. An instance serves one response."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def opening(self, choice: int) -> Struct | None:
        """Said before a choice's first text."""

    def piece(self, chunk: TextChunk) -> Struct:
        """A choice's next text, without its end."""

    def end(self, choice: int, finish_reason: str) -> Struct: ...

    def whole(self, choice: WholeChoice) -> Struct: ...


class ChatShape:
    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def opening(self, choice: int) -> Struct:
        return ChatChunkChoice(choice, Delta(role="assistant", content=""))

    def piece(self, chunk: TextChunk) -> Struct:
        return ChatChunkChoice(
            chunk.choice, Delta(content=chunk.text), _chat_logprobs(chunk.logprobs)
        )

    def end(self, choice: int, finish_reason: str) -> Struct:
        return ChatChunkChoice(choice, Delta(), None, finish_reason)

    def whole(self, choice: WholeChoice) -> Struct:
        logprobs = _chat_logprobs(choice.logprobs)
        return ChatChoice(choice.index, ChatMessage(choice.text), logprobs, choice.finish_reason)


class CompletionShape:
    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(self) -> None:
        self._offsets: dict[int, int] = {}

    def opening(self, choice: int) -> None:  # noqa: ARG002
        return None

    def piece(self, chunk: TextChunk) -> Struct:
        logprobs = self._logprobs(chunk.choice, chunk.logprobs)
        return CompletionChoice(chunk.choice, chunk.text, logprobs)

    def end(self, choice: int, finish_reason: str) -> Struct:
        return CompletionChoice(choice, "", None, finish_reason)

    def whole(self, choice: WholeChoice) -> Struct:
        logprobs = self._logprobs(choice.index, choice.logprobs)
        return CompletionChoice(choice.index, choice.text, logprobs, choice.finish_reason)

    def _logprobs(
        self, choice: int, tokens: tuple[TokenLogprob, ...] | None
    ) -> CompletionLogprobs | None:
        if tokens is None:
            return None
        block = CompletionLogprobs([], [], [], [])
        offset = self._offsets.get(choice, 0)
        for token in tokens:
            block.tokens.append(token.token)
            block.token_logprobs.append(_finite(token.logprob))
            block.top_logprobs.append({text: _finite(value) for text, _, value in token.top})
            block.text_offset.append(offset)
            offset += len(token.token)
        self._offsets[choice] = offset
        return block


def _chat_logprobs(tokens: tuple[TokenLogprob, ...] | None) -> ChatLogprobs | None:
    if tokens is None:
        return None
    return ChatLogprobs(
        [
            ChatTokenLogprob(
                token.token,
                list(token.token_bytes),
                _finite(token.logprob),
                [TopLogprob(text, list(data), _finite(value)) for text, data, value in token.top],
            )
            for token in tokens
        ]
    )


def _finite(logprob: float) -> float:
    """NaN compares false with everything, so it too becomes the lowest."""
    return max(_LOWEST_LOGPROB, logprob)


class Wording:
    """Words one response: the same id, time and model around every object."""

    def __init__(self, shape: Shape, model: str, request_id: str) -> None:
        self.shape = shape
        self._id = shape.id_prefix + request_id
        self._model = model
        self._created = int(time.time())

    def chunk(
        self,
        choices: Iterable[Struct],
        usage: UsageBody | UnsetType | None = UNSET,
        receipt: dict[str, Any] | UnsetType = UNSET,
    ) -> Envelope:
        return self._envelope(self.shape.chunk_object, choices, usage, receipt)

    def whole(
        self, choices: Iterable[WholeChoice], usage: UsageBody, receipt: dict[str, Any]
    ) -> Envelope:
        worded = [self.shape.whole(choice) for choice in choices]
        return self._envelope(self.shape.whole_object, worded, usage, receipt)

    def _envelope(
        self,
        kind: str,
        choices: Iterable[Struct],
        usage: UsageBody | UnsetType | None,
        receipt: dict[str, Any] | UnsetType,
    ) -> Envelope:
        return Envelope(self._id, kind, self._created, self._model, list(choices), usage, receipt)


def usage_body(usage: Usage) -> UsageBody:
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        PromptDetails(usage.cached_tokens),
    )


def receipt_body(receipt: Receipt) -> dict[str, Any]:
    """The receipt's fields under their own names, the tier as a word."""
    body: dict[str, Any] = msgspec.to_builtins(receipt)
    return {**body, "tier": receipt.tier.label}


def status_body(status: ModelStatus) -> dict[str, Any]:
    """The status's fields under their own names, the tier as a word."""
    body: dict[str, Any] = msgspec.to_builtins(status)
    return {**body, "tier": status.tier.label}


def openai_adapter(adapter: RegisteredAdapter) -> dict[str, Any]:
    """An adapter as /v1/models shows it; the fields after owned_by are as vLLM's."""
    return {
        "id": adapter.name,
        "object": "model",
        "created": int(adapter.created_at),
        "owned_by": "flashserve",
        "root": adapter.spec.source,
        "parent": adapter.spec.base,
    }


def openai_model(status: ModelStatus) -> dict[str, Any]:
    """A model as /v1/models shows it; the fields after owned_by are additions."""
    return {
        "id": status.name,
        "object": "model",
        "created": int(status.created_at),
        "owned_by": "flashserve",
        "state": status.state,
        "tier": status.tier.label,
        "context_tokens": status.context_tokens,
        "architecture": status.architecture,
    }
