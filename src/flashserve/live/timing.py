"""Where a request's time goes: from the moments that its life passes to its receipt."""

from __future__ import annotations

import msgspec

from flashserve.live.requests import Receipt
from flashserve.messages.commands import Dispatch, Hold
from flashserve.types import AdapterId, ModelId, Phases, RequestId, Tier

_STARTUP = ("init_s", "device_s", "dram_s", "fetch_s", "place_s")  # the last phase first


def clip_startup(startup: Phases | None, waited_s: float) -> Phases:
    """The part of a cold start that fell into a request's own waiting; the rest is its queue.

    A start that began before the request came ended when the waiting did, so its last phases are
    the ones that were waited for. The result's phases sum to `waited_s`.
    """
    left_s = max(waited_s, 0.0)
    clipped = {}
    for name in _STARTUP:
        clipped[name] = min(getattr(startup, name), left_s) if startup is not None else 0.0
        left_s -= clipped[name]
    return Phases(queue_s=max(left_s, 0.0), **clipped)


class Stopwatch:
    """Fills the receipt of one request. All moments are of one monotonic clock.

    A replica lost before the first token makes the request wait again: what went before the last
    start then counts as queue. One lost later changes `resumed` and `total_s` alone.
    """

    def __init__(
        self,
        request_id: RequestId,
        model_id: ModelId,
        received_at: float,
        arrived_at: float,
        *,
        adapter_id: AdapterId | None = None,
    ) -> None:
        self.receipt = Receipt(
            request_id=request_id,
            model_id=model_id,
            tier=Tier.DEVICE,
            cold=False,
            predicted=Phases(),
            actual=Phases(),
            adapter=adapter_id,
        )
        self._received_at = received_at
        self._arrived_at = arrived_at
        self._wait_began_at = arrived_at
        self._dispatched_at = arrived_at
        self._first_token_at: float | None = None

    def held(self, hold: Hold) -> None:
        """The controller keeps the request waiting, from its arrival on."""
        self.receipt.tier = hold.tier
        self.receipt.predicted = hold.predicted
        self.receipt.reason = hold.reason

    def dispatched(self, dispatch: Dispatch, at: float) -> None:
        if self._first_token_at is not None:
            return
        self._dispatched_at = at
        waiting = clip_startup(dispatch.startup, at - self._wait_began_at)
        earlier_s = self._wait_began_at - self._arrived_at
        self.receipt.actual = msgspec.structs.replace(waiting, queue_s=waiting.queue_s + earlier_s)
        self.receipt.cold = self.receipt.cold or dispatch.startup is not None
        if not self.receipt.resumed:
            self.receipt.tier = dispatch.tier
            self.receipt.predicted = dispatch.predicted
            self.receipt.reason = dispatch.reason

    def lost(self, at: float) -> None:
        """The replica is gone; the request waits for another."""
        self.receipt.resumed += 1
        self._wait_began_at = at

    def added(self, at: float) -> None:
        """The engine has accepted a sequence; the first time counts."""
        if self.receipt.gateway_in_s is None:
            waited_s = self._dispatched_at - self._arrived_at
            self.receipt.gateway_in_s = max(at - self._received_at - waited_s, 0.0)

    def token(
        self, emitted_at: float, at: float, waited_s: float = 0.0, *, is_fetched: bool = False
    ) -> None:
        """Tokens that a worker knew at `emitted_at` are here `at`; the first ones count.

        Args:
            waited_s: how long the replica, dispatched to before all weights were there, waited
                for them. That is a part of the cold start, not of the prefill.
            is_fetched: they came from far, whoever had asked for them first.
        """
        if self._first_token_at is not None:
            return
        self._first_token_at = emitted_at
        self.receipt.ttft_s = at - self._received_at
        since_dispatch_s = max(emitted_at - self._dispatched_at, 0.0)
        waited_s = min(max(waited_s, 0.0), since_dispatch_s)
        actual = self.receipt.actual
        if is_fetched:
            actual = msgspec.structs.replace(actual, fetch_s=actual.fetch_s + waited_s)
        else:
            actual = msgspec.structs.replace(actual, dram_s=actual.dram_s + waited_s)
        self.receipt.actual = msgspec.structs.replace(actual, prefill_s=since_dispatch_s - waited_s)
        self.receipt.cold = self.receipt.cold or waited_s > 0

    def finished(self, at: float) -> None:
        self.receipt.total_s = at - self._received_at

    @property
    def prefill_s(self) -> float | None:
        """Dispatch to first token; None while there is no token."""
        return None if self._first_token_at is None else self.receipt.actual.prefill_s
