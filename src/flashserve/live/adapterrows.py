"""Adapters as rows of the catalogue's file; see catalogue.py."""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from typing import Any

from flashserve.types import AdapterId, AdapterSpec, ModelId

SCHEMA = """
    CREATE TABLE adapters (
        name TEXT PRIMARY KEY,
        version INTEGER NOT NULL,
        base TEXT NOT NULL,
        source TEXT NOT NULL,
        identity TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        rank INTEGER NOT NULL,
        num_parameters INTEGER NOT NULL,
        targets TEXT NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE adapter_versions (
        name TEXT PRIMARY KEY,
        last INTEGER NOT NULL
    ) STRICT, WITHOUT ROWID;
    """
"""adapter_versions outlives its adapters: no version is ever used for other weights."""


@dataclasses.dataclass(frozen=True, slots=True)
class RegisteredAdapter:
    """An adapter as it was added. Its weights are those of this version for good."""

    spec: AdapterSpec
    rank: int
    num_parameters: int
    targets: tuple[str, ...]
    created_at: float
    """Unix time."""

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def adapter_id(self) -> AdapterId:
        return self.spec.adapter_id


def read_adapters(connection: sqlite3.Connection) -> list[RegisteredAdapter]:
    """By name.

    Raises:
        ValueError: a row holds what this version could never have written; names the adapter.
    """
    rows = connection.execute(
        "SELECT name, version, base, source, identity, size_bytes, rank, num_parameters, targets,"
        " created_at FROM adapters ORDER BY name"
    )
    return [_adapter_of(row) for row in rows]


def _adapter_of(row: tuple[Any, ...]) -> RegisteredAdapter:
    name, version, base, source, identity, size, rank, num_parameters, targets, created_at = row
    try:
        kinds = tuple(map(str, json.loads(targets)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"adapter {name}: {error}") from None
    spec = AdapterSpec(name, version, ModelId(base), source, size, identity)
    return RegisteredAdapter(spec, rank, num_parameters, kinds, created_at)


def write_adapter(connection: sqlite3.Connection, adapter: RegisteredAdapter) -> None:
    spec = adapter.spec
    row = (
        spec.name,
        spec.version,
        spec.base,
        spec.source,
        spec.identity,
        spec.size_bytes,
        adapter.rank,
        adapter.num_parameters,
        json.dumps(adapter.targets),
        adapter.created_at,
    )
    connection.execute("INSERT OR REPLACE INTO adapters VALUES (?,?,?,?,?,?,?,?,?,?)", row)


def delete_adapter(connection: sqlite3.Connection, name: str) -> ModelId | None:
    """Its base; None when there was no such adapter."""
    rows = connection.execute(
        "DELETE FROM adapters WHERE name = ? RETURNING base", (name,)
    ).fetchall()
    return ModelId(rows[0][0]) if rows else None


def take_version(connection: sqlite3.Connection, name: str) -> int:
    """A number that no version of the name has had."""
    ((number,),) = connection.execute(
        "INSERT INTO adapter_versions VALUES (?, 1)"
        " ON CONFLICT DO UPDATE SET last = last + 1 RETURNING last",
        (name,),
    ).fetchall()
    return int(number)
