"""Values that every layer shares: identifiers, tiers, phases, model and node facts."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import NewType

import msgspec

ModelId = NewType("ModelId", str)
NodeId = NewType("NodeId", str)
ReplicaId = NewType("ReplicaId", str)
RequestId = NewType("RequestId", str)
AdapterId = NewType("AdapterId", str)
"""Of one version of an adapter, "NAME@VERSION": its weights never change."""

MODEL_NAME = re.compile(r"[A-Za-z0-9._/-]{1,128}")


class Tier(enum.IntEnum):
    """Where a checkpoint's bytes are; a higher tier is nearer to the first token."""

    REMOTE = 0
    DISK = 1
    DRAM = 2
    DEVICE = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class Phases(msgspec.Struct, frozen=True):
    """Seconds that each phase of a time to first token took, or is predicted to take.

    queue: waiting for a slot or behind others; place: for a worker to be free; fetch: remote to
    disk; dram: disk to DRAM; device: DRAM to device (a bind on CPU); init: what else the replica
    needs; prefill: from dispatch to the first token.
    """

    queue_s: float = 0.0
    place_s: float = 0.0
    fetch_s: float = 0.0
    dram_s: float = 0.0
    device_s: float = 0.0
    init_s: float = 0.0
    prefill_s: float = 0.0

    @property
    def startup_s(self) -> float:
        """A cold start alone: no queue, no prefill."""
        return self.place_s + self.fetch_s + self.dram_s + self.device_s + self.init_s

    @property
    def total_s(self) -> float:
        return self.queue_s + self.startup_s + self.prefill_s


@dataclasses.dataclass(frozen=True, slots=True)
class Scaling:
    """How many replicas a model may have.

    min_replicas are kept ready whatever comes; max_replicas: None follows the server. target:
    requests at once that one replica is meant to serve; None is as many as it can.
    """

    min_replicas: int = 0
    max_replicas: int | None = None
    target: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class SeriesForecast:
    """What may arrive for a model, or for MODEL:ADAPTER, from `made_at` on (controller time).

    All by lead, ascending in leads_s: p_arrival is P(at least one arrival within the lead), mean
    and upper the expected count and its 90 % quantile.
    """

    series: ModelId
    made_at: float
    leads_s: tuple[float, ...]
    p_arrival: tuple[float, ...]
    mean: tuple[float, ...]
    upper: tuple[float, ...]
    source: str = ""
    """Which forecaster said it, and why that one."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelSpec:
    """A deployed model, as the controller and the nodes know it."""

    model_id: ModelId
    source: str
    size_bytes: int
    lowest_tier: Tier = Tier.DISK
    """Where the bytes are when FlashServe holds none: DISK for a local directory."""
    keep_alive_s: float | None = None
    """Seconds without a request after which a replica stops; None follows the server."""
    architecture: str = ""
    context_tokens: int = 0
    has_chat_template: bool = False
    scaling: Scaling = Scaling()


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterSpec:
    """One version of a registered LoRA adapter, as nodes know it."""

    name: str
    version: int
    base: ModelId
    source: str
    size_bytes: int
    """Of its weight file."""
    identity: str = ""
    """Of its content, as AdapterFacts said when it was registered."""

    @property
    def adapter_id(self) -> AdapterId:
        return AdapterId(f"{self.name}@{self.version}")


@dataclasses.dataclass(frozen=True, slots=True)
class NodeSpec:
    """What a node offers. `epoch` grows each time it joins, and fences old commands."""

    node_id: NodeId
    epoch: int
    num_workers: int
    dram_bytes: int
    max_sequences: int = 32
    """Requests that one replica takes at once; the others wait in the model's bounded queue."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSlice:
    """One tensor of a snapshot: where its bytes lie in the node's arena.

    dtype is the safetensors name (F32, BF16, F8_E4M3, ...); offset and num_bytes are in bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. temperature 0 is greedy; top_k 0 and top_p 1 are off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 16
    logprobs: int | None = None
    """How many alternatives to report beside each token; None reports no logprobs."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class TokenOutput:
    """One emitted token of a sequence. `index` counts from 0 over the whole completion."""

    index: int
    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    """None while the sequence runs; stop, length, abort or error on its last token."""
    emitted_at: float = 0.0
    """time.monotonic() of the worker when the token was known; one clock for the machine."""


@dataclasses.dataclass(frozen=True, slots=True)
class KVUsage:
    """KV blocks of one engine: used + cached + free == total after any sequence of calls.

    used blocks belong to running sequences; cached ones hold reusable prefixes and nobody's work.
    """

    total: int = 0
    used: int = 0
    cached: int = 0
    free: int = 0
