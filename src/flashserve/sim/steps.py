"""An engine that computes in steps, in virtual time: what both kinds of modelled engines share.

Work goes in runs of equal steps: one step with prompts in it, or as many decodes of the same
sequences as nothing interrupts. A run ends early, at the end of a step, when something arrives that
could join it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable

import msgspec

from flashserve.sim.profiles import EngineShape, StepCosts
from flashserve.types import RequestId

INFINITE = math.inf
PATIENCE = 64
"""Times that a request is passed over for want of its adapter; see engine.batching."""
_NUM_GROUPS = 32
"""A forward pass follows the bytes group by group; what is left after the last one is one group."""
_ROUNDING = 1e-9


class Job(msgspec.Struct, eq=False):
    """What a request asks of an engine, and what has become of it; times are virtual seconds.

    prefix_tokens: of the prompt, equal in all jobs of the same `prefix` (and adapter) of a model.
    num_emitted: tokens so far, those of lost replicas included. gated_s: how long its first step
    waited for weights that were on their way. index: its row in the records, -1 without one.
    """

    request_id: RequestId
    prompt_tokens: int
    output_tokens: int
    adapter: str = ""
    prefix: int | None = None
    prefix_tokens: int = 0
    index: int = -1
    num_emitted: int = 0
    dispatched_at: float = math.nan
    first_token_at: float = math.nan
    gated_s: float = 0.0
    num_passed_over: int = 0


class AdapterSlots:
    """The adapters in one engine's memory, all of one size: loaded on use, longest unused leave.

    Args:
        num_slots: adapters that fit.
        load_s: a copy from DRAM.
    """

    def __init__(self, num_slots: int, load_s: float) -> None:
        self._num_slots = max(num_slots, 1)
        self._load_s = load_s
        self._here: dict[str, float] = {}
        self._pins: dict[str, int] = {}
        self.num_loads = 0
        self.num_hits = 0

    def want(self, adapter: str, now: float) -> float:
        """When it can be used, loading it if there is room; infinite while others use all of it."""
        if (ready_at := self._here.get(adapter)) is not None:
            return ready_at
        if len(self._here) >= self._num_slots:
            victim = next((one for one in self._here if one not in self._pins), None)
            if victim is None:
                return INFINITE
            del self._here[victim]
        self.num_loads += 1
        self._here[adapter] = now + self._load_s
        return now + self._load_s

    def pin(self, adapter: str, now: float, *, may_load: bool = True) -> bool:
        """Use it; false while it is not there."""
        if not may_load and adapter not in self._here:
            return False
        if self.want(adapter, now) > now:
            return False
        self._here[adapter] = self._here.pop(adapter)
        self._pins[adapter] = self._pins.get(adapter, 0) + 1
        self.num_hits += 1
        return True

    def unpin(self, adapter: str) -> None:
        self._pins[adapter] -= 1
        if not self._pins[adapter]:
            del self._pins[adapter]

    @property
    def num_pinned(self) -> int:
        """Adapters in use."""
        return len(self._pins)

    def next_ready(self, now: float) -> float:
        return min((at for at in self._here.values() if at > now), default=INFINITE)


class SteppedEngine(abc.ABC):
    """The engine of one replica. `next_at` is when `advance` must be called next.

    Args:
        costs: of this model's steps.
        is_open: all weights are there; else the first step ends only after `open`.
    """

    def __init__(self, costs: StepCosts, shape: EngineShape, *, is_open: bool = True) -> None:
        self.next_at = INFINITE
        self.num_steps = 0
        self._costs = costs
        self._shape = shape
        self._is_open = is_open
        self._began_at = 0.0
        self._run = 0
        self._step_s = 0.0
        self._stretch = 1.0
        self._turn_at = INFINITE
        """Where the run under way ends before `next_at`, with nothing that anybody is told of."""

    @property
    def is_computing(self) -> bool:
        return self._run > 0

    def pace(self, stretch: float, now: float) -> None:
        """From now on every step takes `stretch` times what it costs; what is under way goes on
        from where it is.
        """
        self.catch_up(now)
        if self._run:
            done = (now - self._began_at) / self._step_s
            self._step_s *= stretch / self._stretch
            self._began_at = now - done * self._step_s
            self.next_at = max(self._end_at, now)
        self._stretch = stretch

    def add(self, job: Job, now: float) -> None:
        if self._turn_at < INFINITE:
            self.catch_up(now)
        self._enqueue(job, now)
        if not self._run:
            self._begin(now)
        elif self._run > 1:
            self._cut(now)

    def open(self, now: float) -> None:
        """The last weights have come."""
        self._is_open = True
        if self._run:
            end = self._began_at + self._step_s
            self.next_at = max(end, now + self._step_s / _NUM_GROUPS)
            for job in self._jobs_of_step():
                job.gated_s += self.next_at - end
            self._look_past()

    def advance(self, now: float) -> list[Job]:
        """Do what is due until now; the jobs that are finished."""
        if not self._run:
            self._begin(now)
            return []
        if now < self.next_at:
            return []
        if self._turn_at < INFINITE:
            return self._end_runs(now)
        return self._end_run(now)

    def catch_up(self, now: float) -> None:
        """Before anything changes: runs that have ended unnoticed are over, and the one under way
        is called for when it ends.
        """
        while self._turn_at < now:
            turn_at, self._turn_at = self._turn_at, INFINITE
            self._end_run(turn_at)
        if self._turn_at < INFINITE:
            self.next_at, self._turn_at = self._turn_at, INFINITE

    def _end_run(self, now: float) -> list[Job]:
        finished = self._complete(self._run, now)
        self.num_steps += self._run
        self._run = 0
        self._begin(now)
        return finished

    @abc.abstractmethod
    def _look_past(self) -> None:
        """Go without a call at the end of runs after which only the next one follows: `_turn_at`
        is then the end of the first of them, and `next_at` that of the last.
        """

    def _end_runs(self, now: float) -> list[Job]:
        """All that `_look_past` saw."""
        self.catch_up(now)
        return self._end_run(now)

    @abc.abstractmethod
    def drop(self, now: float) -> None:
        """The replica is gone: num_emitted of each job is what it had emitted until now."""

    @property
    def _end_at(self) -> float:
        return self._began_at + self._run * self._step_s if self._is_open else INFINITE

    def _seconds(self, num_prompt: int, num_decodes: int, num_adapters: int) -> float:
        """Of one step, at the present pace."""
        return self._costs.step_s(num_prompt, num_decodes, num_adapters) * self._stretch

    def _begin(self, now: float) -> None:
        self._run, self._step_s = self._plan(now)
        self._began_at = now
        if not self._run:
            self.next_at = self._idle_until(now)
            return
        if self._is_open:
            self.next_at = now + self._run * self._step_s
            self._look_past()
        else:
            self._run, self.next_at = 1, INFINITE

    def _cut(self, now: float) -> None:
        """End the run with the step that is under way, so that who waits can join the next one."""
        num_steps = max(1, math.ceil((now - self._began_at) / self._step_s - _ROUNDING))
        if num_steps < self._run and self._could_admit():
            self._run = num_steps
            self.next_at = self._end_at

    def _steps_done(self, now: float) -> int:
        """Whole steps of the run under way."""
        if not self._run:
            return 0
        return min(self._run, math.floor((now - self._began_at) / self._step_s + _ROUNDING))

    @abc.abstractmethod
    def _enqueue(self, job: Job, now: float) -> None: ...

    @abc.abstractmethod
    def _plan(self, now: float) -> tuple[int, float]:
        """So many equal steps from now on, of so many seconds each; 0 when there is nothing."""

    @abc.abstractmethod
    def _complete(self, num_steps: int, now: float) -> list[Job]:
        """The planned steps, or the first of them, are over."""

    @abc.abstractmethod
    def _could_admit(self) -> bool:
        """Whether the first of those who wait could join the next step."""

    @abc.abstractmethod
    def _idle_until(self, now: float) -> float:
        """When something waits that nothing runs for: an adapter on its way."""

    @abc.abstractmethod
    def _jobs_of_step(self) -> list[Job]:
        """The jobs of the run under way."""


EngineMaker = Callable[..., SteppedEngine]
