"""What clients send: OpenAI's completions and chat completions, and the admin orders.

Values are checked strictly (a bool is no number, "3" is no integer); unknown fields pass, because
clients of many servers send fields of their own. Bounds are OpenAI's where it has them.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

import pydantic
from pydantic import BeforeValidator, Field

from flashserve.errors import ModelNotFoundError
from flashserve.live.requests import GenerationRequest
from flashserve.types import MODEL_NAME, ModelId, SamplingParams

_MAX_CHOICES = 128
_MAX_STOPS = 16
_MAX_LOGPROBS = 20
_MAX_INT32 = 2**31 - 1
_MAX_DEADLINE_S = 24 * 3600
_DEFAULT_MAX_TOKENS = 16

TokenId = Annotated[int, Field(ge=0, le=_MAX_INT32)]


def _single_prompt(value: Any) -> Any:
    """A list with one prompt is that prompt, and a list of numbers is one prompt's token ids."""
    if isinstance(value, list) and value and isinstance(value[0], str | list):
        if len(value) > 1:
            raise ValueError("a list of several prompts is not supported: send one request each")
        value = value[0]
    if isinstance(value, str) or (
        isinstance(value, list) and value and all(_is_token_id(item) for item in value)
    ):
        return value
    raise ValueError(
        "must be a string, a list of token ids (integers from 0), or a list with one of these"
    )


def _is_token_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_INT32


def _stop_list(value: Any) -> Any:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > _MAX_STOPS
        or not all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise ValueError(f"must be a non-empty string or a list of up to {_MAX_STOPS} of them")
    return stops


def _joined_text(value: Any) -> Any:
    """Text parts become one string, a line each; parts of other kinds are refused by name."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            named = repr(kind) if isinstance(kind, str) else "something else"
            raise ValueError(f"only parts of type 'text' are supported, this has {named[:40]}")
        texts.append(part["text"])
    if not texts:
        raise ValueError("must have at least one part")
    return "\n".join(texts)


class _Model(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        strict=True, extra="ignore", frozen=True, allow_inf_nan=False
    )


class Extension(_Model):
    """FlashServe's own parameters; ours alone, so a misspelled one is refused."""

    model_config = pydantic.ConfigDict(extra="forbid")

    reuse_prefix: bool = True
    """False computes the whole prompt anew, even where a cached prefix would do."""
    deadline_s: float | None = Field(None, gt=0, le=_MAX_DEADLINE_S)
    """The request may wait for so long to be dispatched; null follows the server."""


class StreamOptions(_Model):
    include_usage: bool | None = None


class _Sampled(_Model):
    """What both endpoints share."""

    model: str = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=_MAX_INT32)
    """Extension: only the k likeliest tokens are drawn from; 0 and -1 are off."""
    n: int | None = Field(None, ge=1, le=_MAX_CHOICES)
    stop: Annotated[list[str], BeforeValidator(_stop_list)] = []
    stop_token_ids: list[TokenId] | None = None
    """Extension: generation stops after any of these tokens."""
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    ignore_eos: bool | None = None
    """Extension: go on to max_tokens, whatever the model says."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    flashserve: Extension | None = None

    @pydantic.model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def extension(self) -> Extension:
        return self.flashserve or Extension()

    def _model_id(self) -> ModelId:
        base, colon, adapter = self.model.partition(":")
        names = (base, adapter) if colon else (base,)
        if not all(map(MODEL_NAME.fullmatch, names)):
            raise ModelNotFoundError("no model can have the name that was asked for", param="model")
        return ModelId(self.model)

    def _params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            # Seeds of torch and numpy start at 0; the fold is the same on every machine.
            seed=None if self.seed is None else self.seed % 2**62,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
        )


class CompletionRequest(_Sampled):
    """The body of POST /v1/completions."""

    prompt: Annotated[str | list[int], BeforeValidator(_single_prompt)]
    """A string, token ids, or a list with one of these."""
    logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    def to_generation(self, received_at: float) -> GenerationRequest:
        text, ids = (self.prompt, None) if isinstance(self.prompt, str) else (None, self.prompt)
        return GenerationRequest(
            model_id=self._model_id(),
            params=self._params(self.max_tokens or _DEFAULT_MAX_TOKENS, self.logprobs),
            prompt=text,
            prompt_ids=None if ids is None else tuple(ids),
            stop=tuple(self.stop),
            num_choices=self.n or 1,
            reuse_prefix=self.extension.reuse_prefix,
            deadline_s=self.extension.deadline_s,
            received_at=received_at,
        )


class Message(_Model):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_text)]
    """A string, or a list of {"type": "text", "text": ...} parts."""
    name: str | None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)
    """Not supported; only null or an empty list passes."""

    def to_template(self) -> dict[str, Any]:
        """As chat templates expect it; they know the developer's role by its older name."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatRequest(_Sampled):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1, le=_MAX_INT32)
    """The newer name of max_tokens, and stronger. Without either, the context is the limit."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_LOGPROBS)

    @pydantic.model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return self

    def to_generation(self, received_at: float) -> GenerationRequest:
        max_tokens = self.max_completion_tokens or self.max_tokens
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return GenerationRequest(
            model_id=self._model_id(),
            params=self._params(max_tokens or _DEFAULT_MAX_TOKENS, logprobs),
            messages=tuple(message.to_template() for message in self.messages),
            stop=tuple(self.stop),
            num_choices=self.n or 1,
            max_tokens_given=max_tokens is not None,
            reuse_prefix=self.extension.reuse_prefix,
            deadline_s=self.extension.deadline_s,
            received_at=received_at,
        )


class _Order(pydantic.BaseModel):
    """Only our own clients send these, so an unknown field is a mistake."""

    model_config = pydantic.ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False
    )


class DeployRequest(_Order):
    """The body of POST /admin/v1/models."""

    name: str = Field(pattern=rf"^{MODEL_NAME.pattern}$")
    source: str = Field(min_length=1, max_length=4096)
    keep_alive_s: float | None = Field(None, ge=0)
    min_replicas: int | None = Field(None, ge=0)
    """Kept ready whatever comes."""
    max_replicas: int | None = Field(None, ge=1)
    target: int | None = Field(None, ge=1)
    """Requests at once that one replica is meant to serve."""
    schedule: list[Annotated[str, Field(max_length=200)]] = Field([], max_length=64)
    """Lines such as "mon-fri 08:00-18:00 min=1", in the server's time zone."""
    replace: bool = False
    """Take the name from a model that has it."""


class AddAdapterRequest(_Order):
    """The body of POST /admin/v1/adapters."""

    base: str = Field(pattern=rf"^{MODEL_NAME.pattern}$")
    """The model that it was trained for."""
    name: str = Field(pattern=rf"^{MODEL_NAME.pattern}$")
    source: str = Field(min_length=1, max_length=4096)
    replace: bool = False
    """Take the name over from another version."""


class LoadLoraRequest(pydantic.BaseModel):
    """The body of POST /v1/load_lora_adapter, as vLLM's clients send it."""

    lora_name: str = Field(pattern=rf"^{MODEL_NAME.pattern}$")
    lora_path: str = Field(min_length=1, max_length=4096)
    base_model_name: str | None = None
    load_inplace: bool = False
    """Take the name over from another version."""


class UnloadLoraRequest(pydantic.BaseModel):
    """The body of POST /v1/unload_lora_adapter, as vLLM's clients send it."""

    lora_name: str = Field(min_length=1, max_length=128)


class TierRequest(_Order):
    """The body of POST /admin/v1/models/NAME/stage and .../evict."""

    tier: Literal["disk", "dram"]


BODIES: list[type[pydantic.BaseModel]] = [
    ChatRequest,
    CompletionRequest,
    DeployRequest,
    AddAdapterRequest,
    LoadLoraRequest,
    UnloadLoraRequest,
    TierRequest,
]
"""Everything that a route reads."""
