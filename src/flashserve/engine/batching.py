"""Decides what one step computes: decodes first, then prompts in chunks, then new sequences.

When blocks run out, the sequence that was admitted last gives all of its blocks back and waits
again at the front; its tokens are computed anew when there is room (preemption by recompute).
The sequence that was admitted first can therefore always go on, and every sequence finishes.

A sequence whose adapter finds no room in the device's memory is passed over by those behind it
that need no room, in a bounded number of steps. Then nobody behind it is admitted before it is;
what runs comes to its end, and with it the claims on that memory.
"""

from __future__ import annotations

import collections
import enum
from collections.abc import Iterator
from typing import Protocol

from flashserve.engine.blocks import BlockPool, chain_digest, root_digest
from flashserve.engine.sequence import Segment, Sequence
from flashserve.types import AdapterId


class AdapterRoom(Protocol):
    """The device's memory for adapters; see engine/lora/cache.py."""

    def pin(self, adapter_id: AdapterId, *, may_load: bool) -> bool:
        """Keeps the adapter there until `unpin`; false if it is not there and cannot be now.

        Args:
            may_load: take room for it that nobody has pinned.
        """

    def unpin(self, adapter_id: AdapterId) -> None: ...


class _Admission(enum.Enum):
    DONE = enum.auto()
    NO_ROOM = enum.auto()
    NO_ADAPTER = enum.auto()


class Batcher:
    """The waiting and the running sequences of one engine.

    Args:
        pool: where the blocks come from.
        max_sequences: sequences that run at a time.
        max_tokens: tokens of one step.
        reuse_prefixes: look for blocks of equal prefixes.
        whole_prompts: compute each prompt as one segment, however long, and each emitted token as
            a segment of its own, so that the shapes of a sequence's segments depend on it alone.
        adapters: needed if any sequence has one.
        adapter_patience: steps in which a sequence is passed over for want of its adapter.
    """

    def __init__(
        self,
        pool: BlockPool,
        max_sequences: int,
        max_tokens: int,
        *,
        reuse_prefixes: bool = True,
        whole_prompts: bool = False,
        adapters: AdapterRoom | None = None,
        adapter_patience: int = 0,
    ) -> None:
        self._pool = pool
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._reuse_prefixes = reuse_prefixes
        self._whole_prompts = whole_prompts
        self._adapters = adapters
        self._adapter_patience = adapter_patience
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

    def remove(self, sequence_id: str) -> Sequence:
        """Takes a finished or aborted sequence out and gives its blocks back."""
        sequence = self._by_id.pop(sequence_id)
        if sequence in self._running:
            self._running.remove(sequence)
            self._unpin(sequence)
        else:
            self._waiting.remove(sequence)
        self._give_back(sequence)
        return sequence

    def schedule(self) -> list[Segment]:
        """The segments of the next step.

        Empty only when there is no sequence at all, or none of them runs or can be given its
        adapter yet.
        """
        plan = _Plan(self._max_tokens)
        preempted = False
        for sequence in sorted(self._running, key=lambda item: item.num_pending > 1):
            if sequence in self._running and plan.budget > 0:
                preempted |= not self._extend(sequence, plan)
        if not preempted:
            self._admit_waiting(plan)
        return list(plan.segments())

    def waiting_for(self, adapter_id: AdapterId) -> list[Sequence]:
        """The sequences of an adapter that do not run."""
        return [item for item in list(self._waiting) if item.adapter_id == adapter_id]

    def computed_with(self, adapter_id: AdapterId) -> list[Sequence]:
        """The sequences of an adapter that run or did before they were preempted."""
        preempted = [item for item in self.waiting_for(adapter_id) if item.num_preemptions]
        running = [item for item in self._running if item.adapter_id == adapter_id]
        return running + preempted

    @property
    def waiting_adapters(self) -> set[AdapterId]:
        """The adapters of sequences that do not run."""
        return {item.adapter_id for item in list(self._waiting) if item.adapter_id is not None}

    def commit(self, segments: list[Segment]) -> None:
        """Records that the segments of the last `schedule` are computed."""
        for segment in segments:
            segment.sequence.num_computed = segment.end
        for sequence in {segment.sequence: None for segment in segments}:
            if self._reuses(sequence):
                self._publish(sequence)

    def num_equal_steps(self, at_most: int) -> int:
        """How many of the next steps do nothing but decode the sequences that run now.

        Asked between steps, when every running sequence has one token that is not computed; it
        holds as long as none is added or removed. For who knows ahead what is emitted, such as the
        simulator.
        """
        can_join = self._waiting and len(self._running) < self._max_sequences
        if not self._running or can_join or len(self._running) > self._max_tokens:
            return 0
        if any(sequence.num_pending != 1 for sequence in self._running):
            return 0
        low, high = 0, at_most
        while low < high:  # the largest number whose blocks are there
            middle = (low + high + 1) // 2
            if self._num_missing(middle) <= self._pool.num_available:
                low = middle
            else:
                high = middle - 1
        return low

    def decode(self, num_steps: int, token_id: int) -> None:
        """Records such steps as computed; in each, every running sequence emitted `token_id`."""
        for sequence in self._running:
            reserved = self._reserve(sequence, sequence.num_computed + num_steps)
            assert reserved
            sequence.tokens += [token_id] * num_steps
            sequence.num_computed += num_steps
            if self._reuses(sequence):
                self._publish(sequence)

    def _num_missing(self, num_steps: int) -> int:
        return sum(
            self._pool.blocks_for(sequence.num_computed + num_steps) - len(sequence.blocks)
            for sequence in self._running
        )

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

    def _admit_waiting(self, plan: _Plan) -> None:
        """Admits from the front; passes over those whose adapters have no room, within limits."""
        passed: list[Sequence] = []
        overtaken: set[Sequence] = set()
        while len(passed) < len(self._waiting):
            sequence = self._waiting[len(passed)]
            # Room goes to whoever waits for it first; those behind may use what is there.
            admission = self._admit(sequence, plan, may_load=not passed)
            if admission is _Admission.NO_ROOM:
                break
            if admission is _Admission.DONE:
                overtaken.update(passed)
            elif sequence.num_passed_over >= self._adapter_patience:
                break
            else:
                passed.append(sequence)
        for sequence in overtaken:
            sequence.num_passed_over += 1

    def _admit(self, sequence: Sequence, plan: _Plan, *, may_load: bool) -> _Admission:
        """Plans the first tokens of a waiting sequence if the step and the pools have room."""
        if plan.budget <= 0 or len(self._running) >= self._max_sequences:
            return _Admission.NO_ROOM
        if self._whole_prompts and plan and sequence.num_pending > plan.budget:
            return _Admission.NO_ROOM
        reused = list(self._find_prefix(sequence))
        num_new = self._pool.blocks_for(len(sequence.tokens)) - len(reused)
        num_revived = sum(not self._pool.is_used(block) for block in reused)
        if num_new + num_revived > self._pool.num_available:
            return _Admission.NO_ROOM
        if not self._pin(sequence, may_load=may_load):
            return _Admission.NO_ADAPTER
        for block in reused:
            self._pool.share(block)
        sequence.blocks = reused
        sequence.num_published = len(reused)
        sequence.num_computed = len(reused) * self._pool.block_tokens
        if not sequence.num_preemptions:
            sequence.num_reused = sequence.num_computed
        self._waiting.remove(sequence)
        self._running.append(sequence)
        spans = self._first_spans(sequence, plan)
        reserved = self._reserve(sequence, spans[-1][1])
        assert reserved
        plan.put(sequence, spans)
        return _Admission.DONE

    def _pin(self, sequence: Sequence, *, may_load: bool) -> bool:
        if sequence.adapter_id is None:
            return True
        assert self._adapters is not None
        return self._adapters.pin(sequence.adapter_id, may_load=may_load)

    def _unpin(self, sequence: Sequence) -> None:
        if sequence.adapter_id is not None:
            assert self._adapters is not None
            self._adapters.unpin(sequence.adapter_id)

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
        self._unpin(sequence)
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
