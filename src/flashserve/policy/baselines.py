"""What platforms do today, as policies: fixed keep-alives, always on, reactive, ServerlessLLM."""

from __future__ import annotations

import math

from flashserve.policy import text
from flashserve.policy.plans import Facts, Plan, clamp, replicas_for_load
from flashserve.types import ModelId


class _Stateless:
    """Learns nothing."""

    shares_slots = True

    def arrived(self, model_id: ModelId, now: float) -> None:
        pass

    def forget(self, model_id: ModelId) -> None:
        pass


class FixedKeepAlive(_Stateless):
    """An idle replica stays for a fixed time; None: the model's own, or the server's."""

    def __init__(self, keep_alive_s: float | None = None) -> None:
        self._keep_alive_s = keep_alive_s
        self.name = "keep-alive" if keep_alive_s is None else f"keep-alive-{keep_alive_s:g}s"

    def plan(self, facts: Facts, now: float) -> Plan:  # noqa: ARG002 - of all policies
        keep_s = facts.keep_alive_s if self._keep_alive_s is None else self._keep_alive_s
        return Plan(clamp(replicas_for_load(facts), facts), keep_s)


class AlwaysOn(_Stateless):
    """At least one replica of every model at all times, as far as there is room."""

    name = "always-on"

    def plan(self, facts: Facts, now: float) -> Plan:  # noqa: ARG002 - of all policies
        wanted = max(1, replicas_for_load(facts))
        return Plan(clamp(wanted, facts), math.inf, why="always on")


class Reactive(_Stateless):
    """Replicas follow the requests that run and wait; idle ones stop after a cooldown.

    Source: KEDA's scaling from and to zero, whose cooldownPeriod is 300 s by default
    (keda.sh, ScaledObject specification). Unlike there, a request at zero wakes the model at once
    and not at the next poll.
    """

    name = "reactive"

    def __init__(self, cooldown_s: float = 300.0) -> None:
        self._cooldown_s = cooldown_s

    def plan(self, facts: Facts, now: float) -> Plan:  # noqa: ARG002 - of all policies
        wanted = clamp(replicas_for_load(facts), facts)
        load = f"{facts.in_flight} running and {facts.waiting} waiting"
        reason = f"{load} need {text.count(wanted, 'replica')}, cooldown {self._cooldown_s:g} s"
        return Plan(wanted, self._cooldown_s, why=reason)


class ServerlessLlm(_Stateless):
    """ServerlessLLM's scheduling: a start goes where queue and load are estimated shortest.

    That estimate (bytes over the bandwidth of the tier, beside the queue) is what `placement` does
    here as well. Its replicas have a fixed keep-alive and do not give way before it is over.

    Source: ServerlessLLM, OSDI 2024, and its router at commit 9f50241.
    """

    shares_slots = False

    def __init__(self, keep_alive_s: float = 60.0) -> None:
        self._keep_alive_s = keep_alive_s
        self.name = "serverlessllm"

    def plan(self, facts: Facts, now: float) -> Plan:  # noqa: ARG002 - of all policies
        wanted = clamp(replicas_for_load(facts), facts)
        return Plan(wanted, self._keep_alive_s)
