"""Every scaling policy by name, for settings, shadows and simulations."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from flashserve.errors import InputError
from flashserve.policy.baselines import AlwaysOn, FixedKeepAlive, Reactive, ServerlessLlm
from flashserve.policy.cost import Prices
from flashserve.policy.histogram import HybridHistogram, NextGap
from flashserve.policy.oracle import Oracle
from flashserve.policy.plans import Policy
from flashserve.policy.scaling import Predictive
from flashserve.types import ModelId

Future = Mapping[ModelId, Sequence[float]]
"""Of every model its arrivals, ascending, in the controller's time."""

_KEEP_ALIVE = re.compile(r"(keep-alive|serverlessllm)-(\d{1,6})(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}
LIVE = ("flashserve", "keep-alive", "reactive", "histogram", "always-on", "serverlessllm")
"""What a server can run; keep-alive and serverlessllm also with a time, as keep-alive-10m."""
ORACLE = "oracle"
"""Knows the future: for simulations."""


def make_policy(
    name: str,
    prices: Prices,
    *,
    future: Future | None = None,
    next_gap: NextGap | None = None,
) -> Policy:
    """A new policy, which has learnt nothing.

    Args:
        future: for the oracle.
        next_gap: the histogram's forecast of gaps outside its range (ARIMA as published).

    Raises:
        InputError: no policy has this name; lists those that there are.
    """
    if match := _KEEP_ALIVE.fullmatch(name):
        keep_s = float(match[2]) * _SECONDS[match[3]]
        policy = ServerlessLlm(keep_s) if match[1] == "serverlessllm" else FixedKeepAlive(keep_s)
        policy.name = name
        return policy
    made: dict[str, Callable[[], Policy]] = {
        "flashserve": lambda: Predictive(prices),
        "keep-alive": FixedKeepAlive,
        "reactive": Reactive,
        "histogram": lambda: HybridHistogram(next_gap),
        "always-on": AlwaysOn,
        "serverlessllm": ServerlessLlm,
    }
    if future is not None:
        made[ORACLE] = lambda: Oracle(future)
    if name not in made:
        known = ", ".join(made)
        raise InputError(
            f"no policy is named {name!r}; there are {known}, and keep-alive-10m or "
            "serverlessllm-60s with a time of your own"
        )
    return made[name]()
