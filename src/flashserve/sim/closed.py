"""The engine in closed form: what the batcher would do, without its blocks and token lists.

Prompts are computed in chunks beside the decodes, first come first served, as engine.batching does;
between them all decodes move on together, one token a step, so the next end is known at once. What
it leaves out: sequences reserve their whole length in the KV memory when they are admitted, so
nothing is ever preempted; a prefix is either in the memory whole or not.
"""

from __future__ import annotations

import collections
import heapq
import itertools
import math
import sys

from flashserve.sim.profiles import EngineShape, StepCosts
from flashserve.sim.steps import INFINITE, PATIENCE, AdapterSlots, Job, SteppedEngine


class ClosedEngine(SteppedEngine):
    def __init__(
        self,
        costs: StepCosts,
        shape: EngineShape,
        adapters: AdapterSlots | None = None,
        *,
        is_open: bool = True,
    ) -> None:
        super().__init__(costs, shape, is_open=is_open)
        self._adapters = adapters
        self._waiting: collections.deque[Job] = collections.deque()
        self._prefilling: list[list[int]] = []  # [tokens left, number], in order of admission
        self._jobs: dict[int, Job] = {}  # running ones, by number
        self._decoding: list[tuple[int, int]] = []  # heap of (step after which it ends, number)
        self._chunks: list[tuple[list[int], int]] = []
        self._num_admitted = 0
        self._prompt_ends_at = INFINITE
        self._num_alone = 0
        """Steps of the request that is alone, where `_look_past` saw its end."""
        self._kv_tokens = 0
        self._prefixes: collections.OrderedDict[tuple[str, int], int] = collections.OrderedDict()
        self._prefix_tokens = 0

    def drop(self, now: float) -> None:
        self.catch_up(now)
        reached = self.num_steps + self._steps_done(now)
        for ends_after, number in self._decoding:
            job = self._jobs[number]
            job.num_emitted = job.output_tokens - max(ends_after - reached, 0)

    def _enqueue(self, job: Job, now: float) -> None:
        self._waiting.append(job)
        if job.adapter and self._adapters is not None:
            self._adapters.want(job.adapter, now)

    def _plan(self, now: float) -> tuple[int, float]:
        chunks = self._chunks = []
        if not self._jobs and not self._waiting:
            return 0, 0.0
        shape = self._shape
        num_decodes = len(self._decoding)
        budget = shape.max_tokens - num_decodes
        for entry in self._prefilling:
            taken = min(entry[0], budget)
            if taken <= 0:
                break
            chunks.append((entry, taken))
            budget -= taken
        while self._waiting and budget > 0 and (job := self._next_to_admit(now)) is not None:
            entry = self._admit(job)
            taken = min(entry[0], budget)
            chunks.append((entry, taken))
            budget -= taken
        num_adapters = self._adapters.num_pinned if self._adapters is not None else 0
        if chunks:
            num_tokens = shape.max_tokens - num_decodes - budget
            return 1, self._seconds(num_tokens, num_decodes, num_adapters)
        if num_decodes:
            ahead = self._decoding[0][0] - self.num_steps
            step_s = self._seconds(0, num_decodes, num_adapters)
            return min(ahead, self._steps_until_adapter(now, step_s)), step_s
        return 0, 0.0

    def _look_past(self) -> None:
        """While a request is alone, only its end is told: its chunks and decodes go in one."""
        if len(self._jobs) != 1 or len(self._chunks) != 1 or self._waiting:
            return
        (left, number), taken = self._chunks[0]
        job = self._jobs[number]
        num_decodes = job.output_tokens - job.num_emitted - 1
        if num_decodes <= 0:
            return
        num_adapters = self._adapters.num_pinned if self._adapters is not None else 0
        at, num_chunks = self.next_at, 1
        while left > taken:
            left -= taken
            taken = min(left, self._shape.max_tokens)
            at += self._seconds(taken, 0, num_adapters)
            num_chunks += 1
        self._prompt_ends_at = at
        self._num_alone = num_chunks + num_decodes
        self._turn_at = self.next_at
        self.next_at = at + num_decodes * self._seconds(0, 1, num_adapters)

    def _end_runs(self, now: float) -> list[Job]:
        """In one go: a request that came and went alone leaves nothing to plan."""
        [(_, number)] = self._prefilling
        job = self._jobs[number]
        if not job.num_emitted:
            job.first_token_at = self._prompt_ends_at
        self.num_steps += self._num_alone
        self._prefilling = []
        self._chunks = []
        self._run = 0
        self._began_at = now
        self._turn_at = self.next_at = INFINITE
        return [self._end(number)]

    def _steps_until_adapter(self, now: float, step_s: float) -> int:
        if not self._waiting or self._adapters is None:
            return sys.maxsize
        ready_at = self._adapters.next_ready(now)
        return sys.maxsize if ready_at == INFINITE else max(1, math.ceil((ready_at - now) / step_s))

    def _could_admit(self) -> bool:
        return len(self._jobs) < self._shape.max_sequences

    def _next_to_admit(self, now: float) -> Job | None:
        """Takes the first who waits and has room; those whose adapters have none are passed over,
        as the batcher does it: for so many times, and only by ones whose adapters are there.
        """
        max_sequences, kv_tokens = self._shape.max_sequences, self._shape.kv_tokens
        for place, job in enumerate(self._waiting):
            if len(self._jobs) >= max_sequences:
                return None
            if self._jobs and self._kv_tokens + _length(job) > kv_tokens:
                return None
            slots = self._adapters
            if not job.adapter or slots is None or slots.pin(job.adapter, now, may_load=not place):
                if place:
                    for passed in itertools.islice(self._waiting, place):
                        passed.num_passed_over += 1
                del self._waiting[place]
                return job
            if job.num_passed_over >= PATIENCE:
                return None
        return None

    def _admit(self, job: Job) -> list[int]:
        self._num_admitted += 1
        self._jobs[self._num_admitted] = job
        self._kv_tokens += _length(job)
        left = job.prompt_tokens + job.num_emitted
        if job.prefix is not None:
            left -= self._reuse(job)
        entry = [max(left, 1), self._num_admitted]
        self._prefilling.append(entry)
        return entry

    def _reuse(self, job: Job) -> int:
        """Tokens of the prompt that another one has left in the memory, in whole blocks."""
        assert job.prefix is not None
        block = self._shape.block_tokens
        reusable = min(job.prefix_tokens, job.prompt_tokens - 1) // block * block
        key = (job.adapter, job.prefix)
        found = self._prefixes.pop(key, 0)
        self._prefix_tokens += reusable - found
        self._prefixes[key] = reusable
        while self._prefix_tokens + self._kv_tokens > self._shape.kv_tokens and self._prefixes:
            self._prefix_tokens -= self._prefixes.popitem(last=False)[1]
        return min(found, reusable)

    def _complete(self, num_steps: int, now: float) -> list[Job]:
        reached = self.num_steps + num_steps
        finished: list[Job] = []
        decoding = self._decoding
        while decoding and decoding[0][0] <= reached:
            finished.append(self._end(heapq.heappop(decoding)[1]))
        num_prompts = 0
        for entry, taken in self._chunks:
            entry[0] -= taken
            if not entry[0]:
                num_prompts += 1
                self._first_token(entry[1], reached, now, finished)
        if num_prompts:
            self._prefilling = [entry for entry in self._prefilling if entry[0]]
        return finished

    def _first_token(self, number: int, reached: int, now: float, finished: list[Job]) -> None:
        job = self._jobs[number]
        if not job.num_emitted:
            job.first_token_at = now
        job.num_emitted += 1
        left = job.output_tokens - job.num_emitted
        if left > 0:
            heapq.heappush(self._decoding, (reached + left, number))
        else:
            finished.append(self._end(number))

    def _end(self, number: int) -> Job:
        job = self._jobs.pop(number)
        job.num_emitted = job.output_tokens
        self._kv_tokens -= _length(job)
        if job.adapter and self._adapters is not None:
            self._adapters.unpin(job.adapter)
        return job

    def _idle_until(self, now: float) -> float:
        if self._waiting and self._adapters is not None:
            return self._adapters.next_ready(now)
        return INFINITE

    def _jobs_of_step(self) -> list[Job]:
        return [self._jobs[entry[1]] for entry, _ in self._chunks]


def _length(job: Job) -> int:
    return job.prompt_tokens + job.output_tokens
