"""What the gateway asks of the service, and what it gets back."""

from __future__ import annotations

import dataclasses
from typing import Any

from flashserve.types import AdapterId, KVUsage, ModelId, Phases, RequestId, SamplingParams, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A validated request. Exactly one of prompt, prompt_ids and messages is set.

    num_choices: independent completions of the one prompt (OpenAI's `n`); choice i draws with
    seed + i when a seed is given.
    """

    model_id: ModelId
    """As it was asked for: a model's name, an adapter's, or MODEL:ADAPTER."""
    params: SamplingParams
    prompt: str | None = None
    prompt_ids: tuple[int, ...] | None = None
    messages: tuple[dict[str, Any], ...] | None = None
    stop: tuple[str, ...] = ()
    num_choices: int = 1
    max_tokens_given: bool = True
    """False: generate up to what the context still holds (chat without max_tokens)."""
    reuse_prefix: bool = True
    deadline_s: float | None = None
    tenant: str = ""
    """The name that belongs to its key; "" without one."""
    received_at: float = 0.0
    """time.monotonic() when the gateway had the request's first byte."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenLogprob:
    """One token as OpenAI's `logprobs` shows it; top holds (token text, bytes, logprob)."""

    token: str
    token_bytes: bytes
    logprob: float
    top: tuple[tuple[str, bytes, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TextChunk:
    """A piece of one choice's text. `text` may be empty while a stop string may be beginning."""

    choice: int
    text: str
    num_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: str | None = None
    emitted_at: float = 0.0
    """time.monotonic() of the worker when the last token in it was known."""


@dataclasses.dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclasses.dataclass(slots=True)
class Receipt:
    """Where a response's time went; seconds, one monotonic clock.

    tier: where the model's bytes were when the request arrived; cold: it waited for a start.
    gateway_in_s: request in to engine.add, the replica's start and queue left out.
    gateway_out_s: first token known to the worker until it was written to the socket.
    resumed: how many replicas the request has lost and gone on from.
    """

    request_id: RequestId
    model_id: ModelId
    tier: Tier
    cold: bool
    predicted: Phases
    actual: Phases
    ttft_s: float | None = None
    total_s: float | None = None
    gateway_in_s: float | None = None
    gateway_out_s: float | None = None
    resumed: int = 0
    reason: str = ""
    adapter: AdapterId | None = None
    """The version of the adapter that answered."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelStatus:
    """One line of `flashserve ps`.

    state: cold, loading, ready, draining or failed; tier: the highest that holds the bytes.
    """

    name: str
    source: str
    state: str
    tier: Tier
    replicas: int
    in_flight: int
    waiting: int
    size_bytes: int
    dram_bytes: int
    last_used_s: float | None
    """Seconds since the last request; None when there was none."""
    keep_alive_s: float
    reason: str
    context_tokens: int
    architecture: str
    created_at: float
    """Unix time of the deployment."""
    min_replicas: int = 0
    max_replicas: int | None = None
    """None follows the server."""
    target: int | None = None
    """Requests at once that a replica is meant to serve; None is as many as it can."""
    schedule: tuple[str, ...] = ()
    """Lines that change these three; they show what holds now."""
    wanted_replicas: int = 0
    """By the policy's last plan."""
    plan: str = ""
    """Why, with the numbers compared; empty where the keep-alive alone decides."""
    kv: KVUsage | None = None
    disk_bytes: int = 0
    """Of the disk tier, which holds what was fetched from remote sources."""
    leases: int = 0
    """Replicas and readers that keep the bytes in DRAM where they are."""


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterStatus:
    """One line of `flashserve adapter list`. Counts are of this server's life.

    in_flight: requests under way, those on older versions of the name left out.
    """

    name: str
    base: ModelId
    version: int
    source: str
    rank: int
    num_parameters: int
    targets: tuple[str, ...]
    size_bytes: int
    tier: Tier
    """The highest that holds its bytes."""
    dram_bytes: int
    in_flight: int
    requests: int
    tokens: int
    """Generated."""
    last_used_s: float | None
    advice: str
    """What would be the cheapest way to serve it: multiplex, merge or own replica."""
    reason: str
    """The numbers behind the advice."""
    created_at: float


@dataclasses.dataclass(frozen=True, slots=True)
class Decision:
    """One order of the controller, with the reason it gave."""

    at: float
    """Unix time."""
    action: str
    model_id: ModelId | None
    node_id: str | None
    reason: str
