"""Room on a node: which idle replicas stop and whose bytes leave DRAM, so that a model fits."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from flashserve.control import orders
from flashserve.control.records import Model, Node, Replica
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.policy import eviction
from flashserve.policy.cost import WorkerState, extent_bytes, predict_start
from flashserve.policy.eviction import Candidate
from flashserve.types import ModelId, Tier

_MARGIN = 1.5
"""What is done ahead of requests must be worth so many times what gives way for it."""
_MAX_AGE_S = 3600.0
"""Of a forecast whose rate still counts."""
_NUM_CANDIDATES = 64
"""Models compared before an eviction, least recently used first, unless more must go."""


def make_room(
    state: State, node: Node, model: Model, now: float, *, for_replica: bool
) -> list[Command]:
    """Free a slot (`for_replica`) and the bytes that the model lacks; `node.has_room` holds."""
    commands: list[Command] = []
    if for_replica and node.free_slots <= 0:
        candidates = [_slot_candidate(state, replica, now) for replica in node.idle.values()]
        victim = eviction.least_worth(candidates)
        assert victim is not None, "a start was placed on a node without a free or idle slot"
        commands += _stop(state, victim, eviction.stop_reason(victim, model.model_id), now)
    if model.model_id in node.resident:
        return commands
    need = extent_bytes(model.spec.size_bytes) - node.free_bytes
    if need <= 0:
        return commands
    likely = _byte_candidates(state, node, model, now, limit=_NUM_CANDIDATES)
    victims = eviction.choose_victims(likely, need)
    if victims is None:
        every = _byte_candidates(state, node, model, now, limit=None)
        victims = eviction.choose_victims(every, need)
    assert victims is not None, "a model was placed on a node without room for its bytes"
    for victim in victims:
        commands += _evict(state, node, victim, model.model_id, now)
    return commands


def gives_way(
    state: State, node: Node, model: Model, worth: float, now: float, *, for_replica: bool
) -> bool:
    """Whether all that would have to leave is worth clearly less than `worth` (seconds saved per
    second); always where nothing would.
    """
    lost = 0.0
    if for_replica and node.free_slots <= 0:
        idle = [_slot_candidate(state, replica, now) for replica in node.idle.values()]
        victim = eviction.least_worth(idle)
        if victim is None:
            return False
        lost += victim.worth
    need = extent_bytes(model.spec.size_bytes) - node.free_bytes
    if model.model_id not in node.resident and need > 0:
        likely = _byte_candidates(state, node, model, now, limit=_NUM_CANDIDATES)
        victims = eviction.choose_victims(likely, need)
        if victims is None:
            return False
        lost += sum(victim.worth for victim in victims)
    return lost == 0.0 or worth > _MARGIN * lost


def _rate(model: Model, now: float) -> float | None:
    """Starts that its forecast expects, per second; None where there is no recent one."""
    if model.forecast is None or now - model.forecast.made_at > _MAX_AGE_S:
        return None
    if model.plan.rate_per_s is None or not model.forecast.is_sound:
        return None
    return model.forecast.rate(now)


def free_more(
    state: State, node: Node, model: Model, now: float, *, everything: bool
) -> list[Command]:
    """The node says that the bytes do not fit, whatever we count: evict one more model, or all.

    Slack of an extent here and there, or free memory in pieces, can be behind it.
    """
    if not node.has_room(model.spec):
        return []
    candidates = list(_byte_candidates(state, node, model, now, limit=None))
    chosen = candidates if everything else list(eviction.choose_victims(candidates, 1) or ())
    commands: list[Command] = []
    for victim in chosen:
        commands += _evict(state, node, victim, model.model_id, now)
    return commands


def _evict(
    state: State, node: Node, victim: Candidate, for_model: ModelId, now: float
) -> list[Command]:
    reason = eviction.evict_reason(victim, for_model)
    commands = _stop(state, victim, reason, now)
    spec = state.models[victim.model_id].spec
    return [*commands, orders.evict(state, node, spec, Tier.DRAM, reason)]


def _stop(state: State, victim: Candidate, reason: str, now: float) -> list[Command]:
    commands: list[Command] = []
    for replica_id in victim.replica_ids:
        commands += orders.stop_replica(state, state.replicas[replica_id], reason, now)
    return commands


def _slot_candidate(state: State, replica: Replica, now: float) -> Candidate:
    restart_s = state.estimates.startup_s(
        replica.node_id, replica.model_id, replica.model.size_bytes, Tier.DRAM
    )
    return Candidate(
        replica.model_id,
        idle_s=now - replica.changed_at,
        restart_s=restart_s,
        replica_ids=(replica.replica_id,),
        rate_per_s=_rate(state.models[replica.model_id], now),
    )


def _byte_candidates(
    state: State, node: Node, for_model: Model, now: float, limit: int | None
) -> Iterator[Candidate]:
    """Models whose bytes nothing pins: under no replica (at most `limit`), then under idle ones."""
    for model_id in list(islice(node.evictable, limit)):
        if model_id != for_model.model_id:
            yield _byte_candidate(state, node, state.models[model_id], (), now)
    idle: dict[ModelId, list[Replica]] = {}
    for replica in node.idle.values():
        idle.setdefault(replica.model_id, []).append(replica)
    for model_id, replicas in idle.items():
        resident = node.resident.get(model_id)
        if resident and not resident.is_pinned and model_id != for_model.model_id:
            yield _byte_candidate(state, node, state.models[model_id], tuple(replicas), now)


def _byte_candidate(
    state: State, node: Node, model: Model, replicas: tuple[Replica, ...], now: float
) -> Candidate:
    resident = node.resident[model.model_id]
    costs = state.estimates.costs(node.node_id, model.model_id, WorkerState.SPARE)
    below = max(model.spec.lowest_tier, Tier.DISK if node.node_id in model.disk_nodes else Tier(0))
    restart = predict_start(model.spec.size_bytes, below, costs)
    since = max((replica.changed_at for replica in replicas), default=resident.touched_at)
    return Candidate(
        model.model_id,
        idle_s=now - since,
        restart_s=restart.startup_s if replicas else restart.fetch_s + restart.dram_s,
        num_bytes=resident.num_bytes,
        replica_ids=tuple(replica.replica_id for replica in replicas),
        below=below,
        rate_per_s=_rate(model, now),
    )
