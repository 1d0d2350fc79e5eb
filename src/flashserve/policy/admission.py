"""Whether a request may wait, whose turn it is, and what one that may not wait is told.

Tenants share a model by what they have running: the next place goes to the tenant with the least
for its weight, among equals to the one whose oldest request came first, and within a tenant it is
first come, first served. Nobody starves: a tenant with nothing running is never passed by one that
came later, and what it has running ends. A full queue is shared in the same way: it refuses the
latest request of the tenant that has most waiting for its weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple

from flashserve.policy import text
from flashserve.types import ModelId


@dataclasses.dataclass(frozen=True, slots=True)
class Refusal:
    """code and message as in errors.py."""

    code: str
    message: str
    retry_after_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Why a model's last start failed; requests are answered with it until `until`."""

    code: str
    message: str
    until: float


def refuse_draining() -> Refusal:
    return Refusal("draining", "the server is shutting down and takes no new requests")


def refuse_unknown(model_id: ModelId) -> Refusal:
    return Refusal("model_not_found", f"no model named {model_id} is deployed")


def refuse_failed(failure: Failure, now: float) -> Refusal:
    return Refusal(failure.code, failure.message, max(0.0, failure.until - now))


def refuse_too_large(model_id: ModelId, need_bytes: int, largest_bytes: int) -> Refusal | None:
    """None when the largest node could hold the model."""
    if need_bytes <= largest_bytes:
        return None
    return Refusal(
        "model_too_large",
        f"{model_id} needs {text.size(need_bytes)} of DRAM ({need_bytes} bytes), and the largest "
        f"node has {text.size(largest_bytes)} ({largest_bytes} bytes)",
    )


def refuse_full(
    model_id: ModelId, num_waiting: int, queue_limit: int, wait_s: float
) -> Refusal | None:
    """None when one more request may wait. `wait_s`: when the queue is expected to move."""
    if num_waiting < queue_limit:
        return None
    return Refusal(
        "queue_full",
        f"{text.count(num_waiting, 'request')} already wait for {model_id}, the limit is "
        f"{queue_limit}",
        float(max(1, math.ceil(wait_s))),
    )


class Load(NamedTuple):
    """What one tenant has of a model; `head` is the place in order of arrival of its oldest."""

    tenant: str
    weight: float
    running: int
    waiting: int
    head: int


class Turn(NamedTuple):
    """Sorts tenants that wait: the least comes next."""

    share: float
    head: int
    tenant: str


def turn(load: Load) -> Turn:
    return Turn(load.running / load.weight, load.head, load.tenant)


def choose_tenant(loads: Iterable[Load]) -> Load | None:
    """The tenant whose oldest request is dispatched next; None when none waits."""
    return min((load for load in loads if load.waiting), key=turn, default=None)


def excess(num_waiting: int, weight: float) -> float:
    """How much of a queue somebody has, for his weight."""
    return num_waiting / weight


def gives_way(most: Load, tenant: str, weight: float, num_waiting: int) -> bool:
    """Whether the tenant with most of a full queue gives a place to one more request of `tenant`.

    Not where that tenant would then have as much, so that places do not go to and fro.
    """
    if most.tenant == tenant:
        return False
    return excess(most.waiting, most.weight) > excess(num_waiting + 1, weight)


def refuse_excess(
    model_id: ModelId, num_waiting: int, own_waiting: int, queue_limit: int, wait_s: float
) -> Refusal:
    """For a request that waited and gave its place to a tenant who has less of the queue."""
    return Refusal(
        "queue_full",
        f"{text.count(num_waiting, 'request')} wait for {model_id}, the limit is {queue_limit}, "
        f"and {own_waiting} of them are of this key's tenant: more than its share, so that the "
        "latest gave its place to another tenant",
        float(max(1, math.ceil(wait_s))),
    )


def refuse_late(model_id: ModelId, waited_s: float, waiting_for: str) -> Refusal:
    return Refusal(
        "deadline_exceeded",
        f"the request waited {text.seconds(waited_s)} for {model_id} and was not started in "
        f"time: it waited for {waiting_for}",
    )


def wait_s(num_ahead: int, num_slots: int, run_s: float) -> float:
    """Until `num_ahead` others and this one have had one of `num_slots`, each for `run_s`."""
    return run_s * math.ceil((num_ahead + 1) / max(num_slots, 1))
