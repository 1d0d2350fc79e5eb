"""Whether a request may wait, and what one that may not is told."""

from __future__ import annotations

import dataclasses
import math

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


def refuse_late(model_id: ModelId, waited_s: float, waiting_for: str) -> Refusal:
    return Refusal(
        "deadline_exceeded",
        f"the request waited {text.seconds(waited_s)} for {model_id} and was not started in "
        f"time: it waited for {waiting_for}",
    )


def wait_s(num_ahead: int, num_slots: int, run_s: float) -> float:
    """Until `num_ahead` others and this one have had one of `num_slots`, each for `run_s`."""
    return run_s * math.ceil((num_ahead + 1) / max(num_slots, 1))
