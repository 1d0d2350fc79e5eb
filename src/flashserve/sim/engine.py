"""The engine with its real batching: engine.batching over engine.blocks, in virtual time.

Tokens are made up, so that prompts with one prefix begin with the same ones and nothing else is
alike. While all that runs decodes and nothing can join or end, many steps are taken at once
(`skips`), which gives the same as one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator

from flashserve.engine.batching import Batcher
from flashserve.engine.blocks import BlockPool
from flashserve.engine.sequence import Segment, Sequence
from flashserve.sim.profiles import EngineShape, StepCosts
from flashserve.sim.steps import INFINITE, PATIENCE, AdapterSlots, Job, SteppedEngine
from flashserve.types import AdapterId, SamplingParams

_EMITTED = 1
_FIRST_ID = 2
_PREFIX_IDS = 1 << 40


class _Room:
    """AdapterSlots as the batcher asks for them, at a time that moves."""

    def __init__(self, slots: AdapterSlots) -> None:
        self.now = 0.0
        self._slots = slots

    def pin(self, adapter_id: AdapterId, *, may_load: bool) -> bool:
        return self._slots.pin(adapter_id, self.now, may_load=may_load)

    def unpin(self, adapter_id: AdapterId) -> None:
        self._slots.unpin(adapter_id)


class BatchedEngine(SteppedEngine):
    """Args:
    skips: false takes every step by itself.
    """

    def __init__(
        self,
        costs: StepCosts,
        shape: EngineShape,
        adapters: AdapterSlots | None = None,
        *,
        is_open: bool = True,
        skips: bool = True,
    ) -> None:
        super().__init__(costs, shape, is_open=is_open)
        self._skips = skips
        self._pool = BlockPool(shape.kv_tokens // shape.block_tokens, shape.block_tokens)
        self._adapters = adapters or AdapterSlots(1, 0.0)
        self._room = _Room(self._adapters)
        self._batcher = Batcher(
            self._pool,
            shape.max_sequences,
            shape.max_tokens,
            adapters=self._room,
            adapter_patience=PATIENCE,
        )
        self._jobs: dict[str, Job] = {}
        self._sequences: dict[str, Sequence] = {}
        self._segments: list[Segment] = []
        self._next_id = _FIRST_ID
        self.num_preemptions = 0

    def drop(self, now: float) -> None:
        done = self._steps_done(now)
        decoding = {segment.sequence.sequence_id for segment in self._segments if segment.samples}
        for sequence_id, sequence in self._sequences.items():
            more = done if sequence_id in decoding else 0
            self._jobs[sequence_id].num_emitted = sequence.num_emitted + more

    def _enqueue(self, job: Job, now: float) -> None:
        sequence_id = str(job.request_id)
        sequence = Sequence(
            sequence_id=sequence_id,
            params=SamplingParams(max_tokens=job.output_tokens),
            tokens=[*self._prompt(job), *[_EMITTED] * job.num_emitted],
            num_prompt=job.prompt_tokens,
            seed=0,
            salt=job.adapter,
            reuse_prefix=job.prefix is not None,
            num_given=job.num_emitted,
            adapter_id=AdapterId(job.adapter) if job.adapter else None,
        )
        self._jobs[sequence_id] = job
        self._sequences[sequence_id] = sequence
        self._batcher.add(sequence)
        if job.adapter:
            self._adapters.want(job.adapter, now)

    def _prompt(self, job: Job) -> Iterator[int]:
        """Token ids: those of the prefix, then ones that no other prompt has."""
        num_shared = 0
        if job.prefix is not None:
            num_shared = min(job.prefix_tokens, job.prompt_tokens)
            begin = _PREFIX_IDS * (job.prefix + 1)
            yield from range(begin, begin + num_shared)
        first = self._next_id
        self._next_id += job.prompt_tokens - num_shared
        yield from range(first, self._next_id)

    def _plan(self, now: float) -> tuple[int, float]:
        self._room.now = now
        segments = self._segments = self._batcher.schedule()
        if not segments:
            return 0, 0.0
        num_prompt, num_decodes = 0, 0
        for segment in segments:
            if _is_decode(segment):
                num_decodes += 1
            else:
                num_prompt += segment.end - segment.begin
        step_s = self._seconds(num_prompt, num_decodes, self._adapters.num_pinned)
        if num_prompt or not self._skips:
            return 1, step_s
        return self._num_decodes(segments), step_s

    def _look_past(self) -> None:
        """Every run is ended by itself: where the blocks lie is known only then."""

    def _num_decodes(self, segments: list[Segment]) -> int:
        """Equal steps from this one on: until the first sequence ends or something may change."""
        sequences = [segment.sequence for segment in segments]
        if len(sequences) < self._batcher.num_running or self._batcher.waiting_adapters:
            return 1
        left = min(item.params.max_tokens - item.num_emitted for item in sequences)
        if left <= 1:
            return 1
        # As it will be after this step: one token more is computed, and one more emitted.
        more = self._batcher.num_equal_steps(left)
        return max(1, min(left, more))

    def _complete(self, num_steps: int, now: float) -> list[Job]:
        finished: list[Job] = []
        segments, self._segments = self._segments, []
        self._batcher.commit(segments)
        for segment in segments:
            if segment.samples:
                self._emit(segment.sequence, now)
        if num_steps > 1:
            self._batcher.decode(num_steps - 1, _EMITTED)
        for segment in segments:
            sequence = segment.sequence
            if sequence.num_emitted >= sequence.params.max_tokens:
                finished.append(self._end(sequence))
        return finished

    def _emit(self, sequence: Sequence, now: float) -> None:
        if not sequence.num_emitted:
            self._jobs[sequence.sequence_id].first_token_at = now
        sequence.tokens.append(_EMITTED)

    def _end(self, sequence: Sequence) -> Job:
        self._batcher.remove(sequence.sequence_id)
        del self._sequences[sequence.sequence_id]
        self.num_preemptions += sequence.num_preemptions
        job = self._jobs.pop(sequence.sequence_id)
        job.num_emitted = sequence.num_emitted
        return job

    def _could_admit(self) -> bool:
        return self._batcher.num_running < self._shape.max_sequences

    def _idle_until(self, now: float) -> float:
        if self._batcher.num_waiting:
            return self._adapters.next_ready(now)
        return INFINITE

    def _jobs_of_step(self) -> list[Job]:
        return [self._jobs[segment.sequence.sequence_id] for segment in self._segments]


def _is_decode(segment: Segment) -> bool:
    one_token = segment.end - segment.begin == 1
    return one_token and segment.samples and segment.begin >= segment.sequence.num_prompt
