"""What an agent asks of a worker, and what the worker answers; bodies of wire frames.

| method     | call or stream | body         | answer            |
|------------|----------------|--------------|-------------------|
| load       | call           | LoadModel    | LoadReport        |
| unload     | call           | -            | UnloadReport      |
| describe   | call           | DescribeModel| ModelDescription  |
| generate   | stream         | GenerateJob  | TokenBatch items  |
| prepare    | notice         | Prepare      | -                 |
| opened     | notice         | Opened       | -                 |
| failed     | notice         | ArrivalFailed| -                 |
| adapter    | notice         | AdapterImage | -                 |
| prefetch   | notice         | AdapterId    | -                 |
| drop       | call           | DropAdapter  | -                 |
| stats      | call           | -            | WorkerStats       |
A worker's first frame is the notice `ready` with a WorkerReady; it may send `lost`, a ModelLost.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flashserve.types import (
    AdapterId,
    KVUsage,
    ModelId,
    SamplingParams,
    TensorSlice,
    Tier,
    TokenOutput,
)


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerReady:
    pid: int
    torch_version: str
    num_threads: int
    device: str = "cpu"


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
    identity: str = ""
    """Of the checkpoint's content. A model that sleeps under it wakes; without one, none does."""

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
    """Binding the weights (CPU), or starting their copies (accelerator), for which the first step
    then waits."""
    init_s: float
    """Everything else: building the module, the KV pool, first-use work."""
    kv: KVUsage
    was_asleep: bool = False
    """It was not built anew."""


@dataclasses.dataclass(frozen=True, slots=True)
class UnloadReport:
    asleep: tuple[ModelId, ...] = ()
    """Models that this worker would wake instead of building them anew."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelLost:
    """A worker cannot go on with the model that it had loaded, and holds it no more."""

    model_id: ModelId
    code: str
    message: str


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
class LoraLayer:
    """The low-rank update of one linear layer or embedding: W x + scaling * B A x.

    module is the base model's name of it, as in `model.layers.0.self_attn.q_proj`. For a linear
    layer a is [rank, in_features] and b [out_features, rank]; for an embedding a is
    [rank, vocabulary] and b [hidden, rank].
    """

    module: str
    scaling: float
    a: TensorSlice
    b: TensorSlice


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterImage:
    """An adapter whose bytes lie in the arena until the worker has answered `drop`.

    The worker copies what it needs into its own memory when a sequence is to use it.
    """

    adapter_id: AdapterId
    layers: tuple[LoraLayer, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class DropAdapter:
    """The adapter's bytes in the arena may be read no more.

    is_damaged: they were not what they should be, so what the worker has copied or computed from
    them goes too. Sequences that run on the adapter end with an error.
    """

    adapter_id: AdapterId
    is_damaged: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterFacts:
    """What a node finds out about an adapter before it is registered; see Node.describe_adapter."""

    size_bytes: int
    identity: str
    """Of the content: another one means other weights."""
    rank: int
    """The largest of its layers'."""
    num_parameters: int
    targets: tuple[str, ...]
    """The kinds of modules that it adapts, such as q_proj, sorted."""


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
    adapter_id: AdapterId | None = None
    """Whose update to the base model's weights counts; salt must separate its prefixes."""


@dataclasses.dataclass(frozen=True, slots=True)
class TokenBatch:
    """Tokens of one sequence that were emitted since the last item, oldest first.

    The other fields are those of the first item. added_at: time.monotonic() when the engine
    accepted the sequence; waited_s: how long it then waited for weights that were on their way;
    num_reused: tokens of the prompt whose keys and values were in the cache; is_fetched, which the
    agent adds: the weights were on their way from far.
    """

    tokens: tuple[TokenOutput, ...]
    added_at: float | None = None
    waited_s: float = 0.0
    num_reused: int = 0
    is_fetched: bool = False


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
    identity: str = ""
    """A worker in which it sleeps needs no empty module."""


@dataclasses.dataclass(frozen=True, slots=True)
class WorkerStats:
    kv: KVUsage
    num_running: int
    num_waiting: int
