"""What an agent asks of a worker, and what the worker answers; bodies of wire frames.

| method     | call or stream | body         | answer            |
|------------|----------------|--------------|-------------------|
| load       | call           | LoadModel    | LoadReport        |
| unload     | call           | -            | -                 |
| describe   | call           | DescribeModel| ModelDescription  |
| generate   | stream         | GenerateJob  | TokenBatch items  |
| prepare    | notice         | Prepare      | -                 |
| opened     | notice         | Opened       | -                 |
| failed     | notice         | ArrivalFailed| -                 |
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
    """Make a replica from bytes of the arena, which the worker has mapped.

    The tensors come in groups, see store/order.py. Those of groups [num_open, num_groups) are
    still on their way: `opened` tells when they are there, `failed` that they will never be.
    """

    model_id: ModelId
    config: dict[str, Any]
    """The checkpoint's config.json."""
    generation_config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]
    num_groups: int = 0
    num_open: int = 0

    @property
    def is_whole(self) -> bool:
        return self.num_open >= self.num_groups


@dataclasses.dataclass(frozen=True, slots=True)
class Opened:
    """The bytes of groups [0, num_open) of the model that the worker loaded are there."""

    model_id: ModelId
    num_open: int


@dataclasses.dataclass(frozen=True, slots=True)
class ArrivalFailed:
    """What has not arrived of the model that the worker loaded will not; see errors.py."""

    model_id: ModelId
    code: str
    message: str


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

    The other fields are those of the first item. added_at: time.monotonic() when the engine
    accepted the sequence; waited_s: how long it then waited for weights that were on their way;
    num_reused: tokens of the prompt whose keys and values were in the cache.
    """

    tokens: tuple[TokenOutput, ...]
    added_at: float | None = None
    waited_s: float = 0.0
    num_reused: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Prepare:
    """A hint to a spare worker: this model in these bytes of the arena may be loaded soon.

    The worker touches the page tables of the extents, (offset, num_bytes) each, through its own
    mapping, imports the architecture's modelling code and builds the empty module, so that a cold
    start pays for none of them. Without extents the model was described, not staged.
    """

    extents: tuple[tuple[int, int], ...]
    config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]
    """Their types decide the empty module's; offsets are not used."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStats:
    kv: KVUsage
    num_running: int
    num_waiting: int
