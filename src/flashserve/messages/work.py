"""What an agent asks of a worker, and what the worker answers; bodies of wire frames.

| method     | call or stream | body         | answer            |
|------------|----------------|--------------|-------------------|
| load       | call           | LoadModel    | LoadReport        |
| unload     | call           | -            | -                 |
| describe   | call           | DescribeModel| ModelDescription  |
| generate   | stream         | GenerateJob  | TokenBatch items  |
| prepare    | notice         | Prepare      | -                 |
| stats      | call           | -            | WorkerStats       |
A worker's first frame is the notice `ready` with a WorkerReady.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flashserve.types import KVUsage, ModelId, SamplingParams, TensorSlice, Tier, TokenOutput


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerReady:
    pid: int
    torch_version: str
    num_threads: int


@dataclasses.dataclass(frozen=True, slots=True)
class LoadModel:
    """Make a replica from bytes that already lie in the arena, which the worker has mapped."""

    model_id: ModelId
    config: dict[str, Any]
    """The checkpoint's config.json."""
    generation_config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class LoadReport:
    device_s: float
    """Binding (CPU) or copying (accelerator) the weights."""
    init_s: float
    """Everything else: building the module, the KV pool, first-use work."""
    kv: KVUsage


@dataclasses.dataclass(frozen=True, slots=True)
class DescribeModel:
    """Would this model be served exactly? Shapes come from the safetensors headers."""

    config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]
    """Offsets are not used."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelDescription:
    architecture: str
    context_tokens: int
    num_parameters: int
    kv_bytes_per_token: int


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFacts:
    """What a node finds out about a source before it is deployed; see Node.describe."""

    size_bytes: int
    identity: str
    """Of the content: another one means other weights."""
    directory: str
    """Holds the checkpoint's files, tokenizer included, on the node."""
    architecture: str
    context_tokens: int
    has_chat_template: bool
    kv_bytes_per_token: int
    lowest_tier: Tier = Tier.DISK


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateJob:
    """One sequence. `emitted_ids` are tokens that another replica produced before it was lost:
    they are not sent again, and the next output has index len(emitted_ids).
    """

    sequence_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    emitted_ids: tuple[int, ...] = ()
    salt: str = ""
    """Separates the reusable prefixes of adapters; empty for the base model."""
    reuse_prefix: bool = True


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of one sequence that were emitted since the last item, oldest first.

    added_at: time.monotonic() when the engine accepted the sequence; first item only.
    """

    tokens: tuple[TokenOutput, ...]
    added_at: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Prepare:
    """A hint to a spare worker: this model in these bytes of the arena may be loaded soon.

    The worker touches the page tables of [offset, offset + num_bytes) through its own mapping,
    imports the architecture's modelling code and builds the empty module, so that a cold start
    pays for none of them. num_bytes may be 0: the model was described, not staged.
    """

    offset: int
    num_bytes: int
    config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]
    """Their types decide the empty module's; offsets are not used."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStats:
    kv: KVUsage
    num_running: int
    num_waiting: int
