"""The deployed models, as the catalogue keeps them."""

from __future__ import annotations

import dataclasses
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from flashserve.errors import InputError
from flashserve.policy.schedules import NO_BOUNDS, Bounds
from flashserve.types import ModelId, ModelSpec, Tier

BOUNDS_SCHEMA = """
    ALTER TABLE models ADD COLUMN min_replicas INTEGER;
    ALTER TABLE models ADD COLUMN max_replicas INTEGER;
    ALTER TABLE models ADD COLUMN target INTEGER;
    ALTER TABLE models ADD COLUMN schedule TEXT NOT NULL DEFAULT '[]';
    """
"""Columns that came after the table was first released."""


@dataclasses.dataclass(frozen=True, slots=True)
class DeployedModel:
    """A model as it was deployed. `directory` holds its files, tokenizer included."""

    spec: ModelSpec
    identity: str
    """Of the source's content, as the store computes it; another one means other weights."""
    directory: Path
    kv_bytes_per_token: int
    created_at: float
    """Unix time."""
    bounds: Bounds = NO_BOUNDS
    """As they were asked for; spec.scaling is what holds of them now."""


def read_models(connection: sqlite3.Connection) -> list[DeployedModel]:
    rows = connection.execute(
        "SELECT model_id, source, size_bytes, lowest_tier, keep_alive_s, architecture,"
        " context_tokens, has_chat_template, identity, directory, kv_bytes_per_token, created_at,"
        " min_replicas, max_replicas, target, schedule"
        " FROM models ORDER BY model_id"
    )
    return [_model_of(row) for row in rows]


def _model_of(row: tuple[Any, ...]) -> DeployedModel:
    name, source, size, tier, keep_alive_s, architecture, context, chat, *rest = row
    identity, directory, kv_bytes_per_token, created_at, least, most, target, schedule = rest
    try:
        spec = ModelSpec(
            model_id=ModelId(name),
            source=source,
            size_bytes=size,
            lowest_tier=Tier(tier),
            keep_alive_s=keep_alive_s,
            architecture=architecture,
            context_tokens=context,
            has_chat_template=bool(chat),
        )
        lines = msgspec.json.decode(schedule, type=tuple[str, ...])
        bounds = Bounds(least, most, target, lines)
        bounds.windows  # noqa: B018 - a line that is none must not be met later
    except (ValueError, InputError) as error:  # msgspec's are ValueErrors
        raise ValueError(f"model {name}: {error}") from None
    return DeployedModel(spec, identity, Path(directory), kv_bytes_per_token, created_at, bounds)


def write_model(connection: sqlite3.Connection, model: DeployedModel) -> None:
    spec = model.spec
    row = (
        spec.model_id,
        spec.source,
        spec.size_bytes,
        int(spec.lowest_tier),
        spec.keep_alive_s,
        spec.architecture,
        spec.context_tokens,
        int(spec.has_chat_template),
        model.identity,
        str(model.directory),
        model.kv_bytes_per_token,
        model.created_at,
        model.bounds.min_replicas,
        model.bounds.max_replicas,
        model.bounds.target,
        msgspec.json.encode(model.bounds.schedule).decode(),
    )
    connection.execute(
        "INSERT OR REPLACE INTO models VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)", row
    )
