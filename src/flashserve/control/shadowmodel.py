"""One model in a shadow's world: its replicas as numbers, not one by one.

Requests go to the replica with the fewest, so that as many replicas work as there are requests; of
the idle ones, the one that was used last is used next. With that, sums take constant time however
many replicas a policy wants.
"""

from __future__ import annotations

import math
from collections import deque

from flashserve.control.demand import Demand
from flashserve.control.usage import WorkerUsage
from flashserve.policy.keepalive import expires_at
from flashserve.types import ModelId, ModelSpec, RequestId


class Ran:
    """A request in the shadow's world.

    began_at: there; dispatched_at: in the real one; service_s: how long it ran in the real one.
    """

    __slots__ = (
        "arrived_at",
        "began_at",
        "dispatched_at",
        "has_left",
        "model",
        "request_id",
        "service_s",
    )

    def __init__(self, request_id: RequestId, model: ShadowModel, arrived_at: float) -> None:
        self.request_id, self.model, self.arrived_at = request_id, model, arrived_at
        self.began_at: float | None = None
        self.dispatched_at: float | None = None
        self.service_s: float | None = None
        self.has_left = False


class ShadowModel(Demand):
    """`settle` first, then change: usage is counted up to the last settling."""

    def __init__(self, spec: ModelSpec, now: float) -> None:
        super().__init__()
        self.spec = spec
        self.ready = self.loading = 0
        """Replicas."""
        self.running = self.num_waiting = 0
        """Requests."""
        self.usage = WorkerUsage()
        self.has_bytes = False
        self.is_deleted = False
        self.due = self.scheduled = math.inf
        """When it is to be looked at again, and the earliest entry that sees to it."""
        self._starts: deque[tuple[float, int]] = deque()
        """When so many replicas will be ready, earliest first."""
        self._idle: deque[tuple[float, int]] = deque()
        """Since when so many replicas idle, longest first; all: max(0, ready - running)."""
        self._waiting: deque[Ran] = deque()
        self._settled_at = now

    @property
    def model_id(self) -> ModelId:
        return self.spec.model_id

    @property
    def serving(self) -> int:
        """Replicas that start or are ready."""
        return self.ready + self.loading

    @property
    def is_active(self) -> bool:
        """Its usage grows with time."""
        return self.serving > 0

    @property
    def loaded_at(self) -> float:
        """When the next start is over."""
        return self._starts[0][0] if self._starts else math.inf

    @property
    def idle_since(self) -> float:
        """Of the replica that has been idle longest."""
        return self._idle[0][0] if self._idle else math.inf

    @property
    def all_idle_since(self) -> float | None:
        """Since when none works; None while one does, or there is none, or one starts."""
        if self.running or self.loading or not self._idle:
            return None
        return self._idle[-1][0]

    def settle(self, now: float) -> None:
        elapsed_s = now - self._settled_at
        if elapsed_s <= 0:
            return
        self._settled_at = now
        busy = min(self.ready, self.running)
        self.usage.busy_s += busy * elapsed_s
        self.usage.idle_s += (self.ready - busy) * elapsed_s
        self.usage.loading_s += self.loading * elapsed_s

    def take_usage(self) -> WorkerUsage:
        taken, self.usage = self.usage, WorkerUsage()
        return taken

    def begin(self, ran: Ran, now: float) -> None:
        """A request gets a place."""
        ran.began_at = now
        self.usage.requests += 1
        if self.running < self.ready:
            since, number = self._idle.pop()
            if number > 1:
                self._idle.append((since, number - 1))
        self.running += 1

    def end(self, ended_at: float) -> None:
        """A request has left its place, at `ended_at`, which may lie before the last settling."""
        self.running -= 1
        if self.running >= self.ready:
            return
        late_s = self._settled_at - ended_at
        self.usage.busy_s -= late_s
        self.usage.idle_s += late_s
        self._put_idle(ended_at, 1)

    def wait(self, ran: Ran) -> None:
        self._waiting.append(ran)
        self.num_waiting += 1

    def leave(self, ran: Ran) -> None:
        """A request waits no more; it is passed over when its turn comes."""
        ran.has_left = True
        self.num_waiting -= 1
        if not self.num_waiting:
            self._waiting.clear()

    def next_waiting(self) -> Ran | None:
        while self._waiting:
            ran = self._waiting.popleft()
            if not ran.has_left:
                self.num_waiting -= 1
                return ran
        return None

    def start(self, number: int, ready_at: float) -> None:
        last = self._starts[-1][0] if self._starts else -math.inf
        self._starts.append((max(ready_at, last), number))
        self.loading += number

    def load(self, now: float) -> bool:
        """Make ready what has started by now; whether anything has."""
        loaded = 0
        while self._starts and self._starts[0][0] <= now:
            loaded += self._starts.popleft()[1]
        self.loading -= loaded
        busy = min(loaded, max(self.running - self.ready, 0))
        self.ready += loaded
        self.has_bytes = self.has_bytes or loaded > 0
        if loaded > busy:
            self._put_idle(now, loaded - busy)
        return loaded > 0

    def stop_idle(self, wanted: int, keep_idle_s: float, now: float) -> None:
        """Stop replicas beyond the wanted number that have been idle for so long."""
        while self._idle and self.serving > wanted:
            since, number = self._idle[0]
            if expires_at(since, keep_idle_s) > now:
                return
            stopped = min(number, self.serving - wanted)
            self.ready -= stopped
            self._idle.popleft()
            if stopped < number:
                self._idle.appendleft((since, number - stopped))

    def drop_idle(self) -> None:
        """Stop all that do nothing."""
        self.ready -= sum(number for _, number in self._idle)
        self._idle.clear()

    def _put_idle(self, since: float, number: int) -> None:
        """In order of time; one that comes to light late is taken to be no older than the last."""
        last = self._idle[-1][0] if self._idle else -math.inf
        self._idle.append((max(since, last), number))
