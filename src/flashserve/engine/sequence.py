"""One sequence while the engine works on it."""

from __future__ import annotations

import dataclasses

from flashserve.messages.work import GenerateJob
from flashserve.types import AdapterId, SamplingParams


@dataclasses.dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, KV blocks and progress of one job.

    tokens: prompt + every emitted token; positions [0, num_computed) have their keys and values
    in `blocks`, position i in block i // block_tokens. Between steps a running sequence has at
    least one token that is not computed: the one emitted last.
    """

    sequence_id: str
    params: SamplingParams
    tokens: list[int]
    num_prompt: int
    seed: int
    salt: str
    reuse_prefix: bool
    num_given: int = 0
    """Tokens of the completion that a lost replica had emitted."""
    blocks: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    """Digests of the leading full blocks, as far as they have been needed."""
    num_published: int = 0
    num_computed: int = 0
    num_reused: int = 0
    """Prompt tokens whose keys and values another sequence had left in the cache."""
    num_preemptions: int = 0
    adapter_id: AdapterId | None = None
    num_passed_over: int = 0
    """Steps that admitted another one behind it, because its adapter had no room."""

    @classmethod
    def from_job(cls, job: GenerateJob, seed: int) -> Sequence:
        return cls(
            sequence_id=job.sequence_id,
            params=job.params,
            tokens=[*job.prompt_ids, *job.emitted_ids],
            num_prompt=len(job.prompt_ids),
            seed=seed,
            salt=_salt(job),
            reuse_prefix=job.reuse_prefix,
            num_given=len(job.emitted_ids),
            adapter_id=job.adapter_id,
        )

    @property
    def num_emitted(self) -> int:
        """Tokens of the completion so far, those of lost replicas included."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens that have no keys and values yet."""
        return len(self.tokens) - self.num_computed

    @property
    def max_cached_tokens(self) -> int:
        """Positions that need keys and values at the most: the last token never does."""
        return self.num_prompt + self.params.max_tokens - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Positions [begin, end) of a sequence, computed together in one step."""

    sequence: Sequence
    begin: int
    end: int

    @property
    def samples(self) -> bool:
        """The logits of its last row give the sequence's next token."""
        return self.end == len(self.sequence.tokens)


def _salt(job: GenerateJob) -> str:
    """The adapter's identifier is part of it, whatever the job says: its keys are nobody else's."""
    return job.salt if job.adapter_id is None else f"{job.adapter_id}\0{job.salt}"
