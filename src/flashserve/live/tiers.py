"""Moving a model's bytes because somebody asked, and waiting until the node has answered."""

from __future__ import annotations

from flashserve.errors import ModelNotFoundError, UnavailableError, error_from_code
from flashserve.live.runtime import Runtime
from flashserve.messages.commands import Command, Stage
from flashserve.messages.events import (
    Event,
    Evicted,
    EvictRequested,
    ModelDeleted,
    NodeLost,
    Staged,
    StageFailed,
    StageRequested,
)
from flashserve.types import ModelId, Tier


async def bring_to_tier(runtime: Runtime, model_id: ModelId, tier: Tier) -> None:
    """Stage a model; returns when its bytes are in `tier`.

    Raises:
        FlashServeError: what the node failed with, or the model or the node went away.
    """
    with runtime.watch() as handled:
        commands = await runtime.apply(StageRequested(model_id, tier))
        if not _orders_stage(commands, model_id):
            raise UnavailableError(f"there is no node that could stage {model_id}")
        while True:
            event, commands = await handled.get()
            match event:
                case Staged(model_id=staged_id, tier=reached) if staged_id == model_id:
                    if reached >= tier:
                        return
                case StageFailed(model_id=failed_id) if failed_id == model_id:
                    if not _orders_stage(commands, model_id):
                        raise error_from_code(event.code, event.message)
                case _:
                    _check_still_there(event, model_id)


async def take_from_tier(runtime: Runtime, model_id: ModelId, tier: Tier) -> None:
    """Evict a model once its running streams have ended; returns when its bytes are gone.

    Raises:
        FlashServeError: what the node failed with, or the model or the node went away.
    """
    with runtime.watch() as handled:
        await runtime.apply(EvictRequested(model_id, tier))
        while True:
            event, _ = await handled.get()
            match event:
                case Evicted(model_id=evicted_id) if evicted_id == model_id:
                    if runtime.controller.model_view(model_id).state != "draining":
                        return
                case StageFailed(model_id=failed_id) if failed_id == model_id:
                    raise error_from_code(event.code, event.message)
                case _:
                    _check_still_there(event, model_id)


def _orders_stage(commands: list[Command], model_id: ModelId) -> bool:
    """Is the node's answer still to come?"""
    return any(
        isinstance(command, Stage) and command.model.model_id == model_id for command in commands
    )


def _check_still_there(event: Event, model_id: ModelId) -> None:
    if isinstance(event, ModelDeleted) and event.model_id == model_id:
        raise ModelNotFoundError(f"model {model_id} was deleted meanwhile")
    if isinstance(event, NodeLost):
        raise UnavailableError(f"node {event.node_id} was lost meanwhile; try again")
