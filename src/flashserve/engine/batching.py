"""Decides what one step computes: decodes first, then prompts in chunks, then new sequences.

When blocks run out, the sequence that was admitted last gives all of its blocks back and waits
again at the front; its tokens are computed anew when there is room (preemption by recompute).
The sequence that was admitted first can therefore always go on, and every sequence finishes.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator

from flashserve.engine.blocks import BlockPool, chain_digest, root_digest
from flashserve.engine.sequence import Segment, Sequence


class Batcher:
    """The waiting and the running sequences of one engine.

    Args:
        pool: where the blocks come from.
        max_sequences: sequences that run at a time.
        max_tokens: tokens of one step.
        reuse_prefixes: look for blocks of equal prefixes.
        whole_prompts: compute each prompt as one segment, however long, and each emitted token as
            a segment of its own, so that the shapes of a sequence's segments depend on it alone.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_sequences: int,
        max_tokens: int,
        *,
        reuse_prefixes: bool = True,
        whole_prompts: bool = False,
    ) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._reuse_prefixes = reuse_prefixes
        self._whole_prompts = whole_prompts
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._running: list[Sequence] = []  # in the order of admission
        self._by_id: dict[str, Sequence] = {}

    def __contains__(self, sequence_id: str) -> bool:
        return sequence_id in self._by_id

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence whose max_cached_tokens fit the pool.

        Another thread may call it while `schedule`, `commit` or a step runs: nothing looks at a
        sequence before the last line.
        """
        assert self._pool.blocks_for(sequence.max_cached_tokens) <= self._pool.num_blocks
        self._by_id[sequence.sequence_id] = sequence
        self._waiting.append(sequence)

    def remove(self, sequence_id: str) -> None:
        """Takes a finished or aborted sequence out and gives its blocks back."""
        sequence = self._by_id.pop(sequence_id)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._give_back(sequence)

    def schedule(self) -> list[Segment]:
        """The segments of the next step; empty only when there is no sequence at all."""
        plan = _Plan(self._max_tokens)
        preempted = False
        for sequence in sorted(self._running, key=lambda item: item.num_pending > 1):
            if sequence in self._running and plan.budget > 0:
                preempted |= not self._extend(sequence, plan)
        while not preempted and self._waiting and self._admit(self._waiting[0], plan):
            pass
        return list(plan.segments())

    def commit(self, segments: list[Segment]) -> None:
        """Records that the segments of the last `schedule` are computed."""
        for segment in segments:
            segment.sequence.num_computed = segment.end
        for sequence in {segment.sequence: None for segment in segments}:
            if self._reuses(sequence):
                self._publish(sequence)

    def _extend(self, sequence: Sequence, plan: _Plan) -> bool:
        """Plans the next tokens of a running sequence; False if anything was preempted for it."""
        num_tokens = plan.share(sequence.num_pending)
        kept_all = True
        while not self._reserve(sequence, sequence.num_computed + num_tokens):
            kept_all = False
            victim = self._running[-1]
            plan.drop(victim)
            self._preempt(victim)
            if victim is sequence:
                return False
        plan.put(sequence, [(sequence.num_computed, sequence.num_computed + num_tokens)])
        return kept_all

    def _admit(self, sequence: Sequence, plan: _Plan) -> bool:
        """Plans the first tokens of a waiting sequence if the step and the pool have room."""
        if plan.budget <= 0 or len(self._running) >= self._max_sequences:
            return False
        if self._whole_prompts and plan and sequence.num_pending > plan.budget:
            return False
        reused = list(self._find_prefix(sequence))
        num_new = self._pool.blocks_for(len(sequence.tokens)) - len(reused)
        num_revived = sum(not self._pool.is_used(block) for block in reused)
        if num_new + num_revived > self._pool.num_available:
            return False
        for block in reused:
            self._pool.share(block)
        sequence.blocks = reused
        sequence.num_published = len(reused)
        sequence.num_computed = len(reused) * self._pool.block_tokens
        if not sequence.num_preemptions:
            sequence.num_reused = sequence.num_computed
        self._waiting.popleft()
        self._running.append(sequence)
        spans = self._first_spans(sequence, plan)
        reserved = self._reserve(sequence, spans[-1][1])
        assert reserved
        plan.put(sequence, spans)
        return True

    def _first_spans(self, sequence: Sequence, plan: _Plan) -> list[tuple[int, int]]:
        begin = sequence.num_computed
        if not self._whole_prompts:
            return [(begin, begin + plan.share(sequence.num_pending))]
        replayed = range(sequence.num_prompt, len(sequence.tokens))
        return [(0, sequence.num_prompt), *((at, at + 1) for at in replayed)]

    def _reserve(self, sequence: Sequence, num_tokens: int) -> bool:
        """Gives the sequence blocks for `num_tokens` tokens, or leaves all as it is."""
        num_missing = self._pool.blocks_for(num_tokens) - len(sequence.blocks)
        if num_missing > self._pool.num_available:
            return False
        for _ in range(num_missing):
            after = sequence.blocks[-1] if sequence.blocks else None
            sequence.blocks.append(self._pool.allocate(after))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)

    def _give_back(self, sequence: Sequence) -> None:
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = sequence.num_published = 0

    def _reuses(self, sequence: Sequence) -> bool:
        return self._reuse_prefixes and sequence.reuse_prefix

    def _find_prefix(self, sequence: Sequence) -> Iterator[int]:
        """Blocks of equal leading tokens; the last token is left to compute, for its logits."""
        if self._reuses(sequence):
            for index in range((len(sequence.tokens) - 1) // self._pool.block_tokens):
                block = self._pool.find(self._digest(sequence, index))
                if block is None:
                    return
                yield block

    def _publish(self, sequence: Sequence) -> None:
        num_full = sequence.num_computed // self._pool.block_tokens
        for index in range(sequence.num_published, num_full):
            self._pool.publish(sequence.blocks[index], self._digest(sequence, index))
        sequence.num_published = num_full

    def _digest(self, sequence: Sequence, index: int) -> bytes:
        size = self._pool.block_tokens
        while len(sequence.digests) <= index:
            at = len(sequence.digests)
            parent = sequence.digests[-1] if at else root_digest(sequence.salt)
            sequence.digests.append(
                chain_digest(parent, sequence.tokens[at * size : (at + 1) * size])
            )
        return sequence.digests[index]


class _Plan:
    """The segments of a step while it is put together."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._segments: dict[Sequence, list[Segment]] = {}

    def __bool__(self) -> bool:
        return bool(self._segments)

    def share(self, num_tokens: int) -> int:
        return min(num_tokens, self.budget)

    def put(self, sequence: Sequence, spans: list[tuple[int, int]]) -> None:
        self._segments[sequence] = [Segment(sequence, begin, end) for begin, end in spans]
        self.budget -= sum(end - begin for begin, end in spans)

    def drop(self, sequence: Sequence) -> None:
        segments = self._segments.pop(sequence, [])
        self.budget += sum(segment.end - segment.begin for segment in segments)

    def segments(self) -> Iterator[Segment]:
        for segments in self._segments.values():
            yield from segments
