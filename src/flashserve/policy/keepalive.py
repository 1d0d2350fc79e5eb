"""When a replica without requests stops, and what its fixed time is where nothing else decides."""

from __future__ import annotations

from flashserve.policy import text
from flashserve.types import ModelSpec


def keep_alive_s(model: ModelSpec, default_s: float) -> float:
    return default_s if model.keep_alive_s is None else model.keep_alive_s


def expires_at(idle_since: float, keep_alive: float) -> float:
    """When a replica that has been idle since then stops; with 0, as soon as it is idle."""
    return idle_since + keep_alive


def stop_reason(idle_s: float, keep_alive: float, why: str = "") -> str:
    """`why`: what the policy said of it; nothing for a fixed keep-alive."""
    if why:
        return f"idle {text.seconds(idle_s)}; {why}"
    return f"idle {text.seconds(idle_s)} ≥ keep-alive {text.seconds(keep_alive)}"
