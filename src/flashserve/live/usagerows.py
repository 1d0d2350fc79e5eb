"""What models took on each day, as the catalogue keeps it. Days are those of UTC."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterable

from flashserve.control.ledger import Series
from flashserve.control.usage import FIELDS, WorkerUsage
from flashserve.types import ModelId

_COLUMNS = {name: "REAL" if name.endswith("_s") else "INTEGER" for name in FIELDS}


def _columns(prefix: str = "") -> str:
    return ", ".join(f"{prefix}{name} {kind} NOT NULL" for name, kind in _COLUMNS.items())


SCHEMA = f"""
    CREATE TABLE usage (
        day INTEGER NOT NULL,
        model_id TEXT NOT NULL,
        adapter TEXT NOT NULL,
        tenant TEXT NOT NULL,
        {_columns()},
        PRIMARY KEY (day, model_id, adapter, tenant)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE shadow_usage (
        day INTEGER NOT NULL,
        policy TEXT NOT NULL,
        model_id TEXT NOT NULL,
        {_columns()},
        {_columns("live_")},
        PRIMARY KEY (day, policy, model_id)
    ) STRICT, WITHOUT ROWID;
    """
"""live_ columns are what the server itself took while the shadow was watching."""


@dataclasses.dataclass(slots=True)
class Compared:
    """What a shadow took, and the server itself in the same time."""

    shadow: WorkerUsage = dataclasses.field(default_factory=WorkerUsage)
    live: WorkerUsage = dataclasses.field(default_factory=WorkerUsage)

    def add(self, other: Compared) -> None:
        self.shadow.add(other.shadow)
        self.live.add(other.live)


ShadowSeries = tuple[str, ModelId]
"""A policy's name, and a model."""


@dataclasses.dataclass(slots=True)
class Accounts:
    """What was taken in some time. first_day: of what was read; None where nothing was kept."""

    usage: dict[Series, WorkerUsage] = dataclasses.field(default_factory=dict)
    compared: dict[ShadowSeries, Compared] = dataclasses.field(default_factory=dict)
    first_day: int | None = None

    def add(self, other: Accounts) -> None:
        """`other` keeps what it has: nothing of it becomes part of this."""
        for series, usage in other.usage.items():
            self.add_usage(series, usage)
        for key, compared in other.compared.items():
            self.add_compared(key, compared)

    def add_usage(self, series: Series, usage: WorkerUsage) -> None:
        if (known := self.usage.get(series)) is None:
            known = self.usage[series] = WorkerUsage()
        known.add(usage)

    def add_compared(self, key: ShadowSeries, compared: Compared) -> None:
        if (known := self.compared.get(key)) is None:
            known = self.compared[key] = Compared()
        known.add(compared)


def add(connection: sqlite3.Connection, day: int, accounts: Accounts) -> None:
    """Add to what is kept of a day; within the caller's transaction."""
    connection.executemany(
        _upsert("usage", 4, FIELDS),
        [(day, *series, *_values(usage)) for series, usage in accounts.usage.items()],
    )
    connection.executemany(
        _upsert("shadow_usage", 3, (*FIELDS, *(f"live_{name}" for name in FIELDS))),
        [
            (day, *key, *_values(compared.shadow), *_values(compared.live))
            for key, compared in accounts.compared.items()
        ],
    )


def read(connection: sqlite3.Connection, first_day: int) -> Accounts:
    """All from that day on."""
    sums = ", ".join(f"sum({name})" for name in FIELDS)
    live = ", ".join(f"sum(live_{name})" for name in FIELDS)
    accounts = Accounts()
    (accounts.first_day,) = connection.execute(
        "SELECT min(day) FROM usage WHERE day >= ?", (first_day,)
    ).fetchone()
    for model_id, adapter, tenant, *values in connection.execute(
        f"SELECT model_id, adapter, tenant, {sums} FROM usage WHERE day >= ?"  # noqa: S608
        " GROUP BY model_id, adapter, tenant",
        (first_day,),
    ):
        accounts.usage[Series(ModelId(model_id), adapter, tenant)] = WorkerUsage(*values)
    for policy, model_id, *values in connection.execute(
        f"SELECT policy, model_id, {sums}, {live} FROM shadow_usage WHERE day >= ?"  # noqa: S608
        " GROUP BY policy, model_id",
        (first_day,),
    ):
        half = len(FIELDS)
        compared = Compared(WorkerUsage(*values[:half]), WorkerUsage(*values[half:]))
        accounts.compared[policy, ModelId(model_id)] = compared
    return accounts


def drop(connection: sqlite3.Connection, before_day: int) -> None:
    """Forget the days before that one; within the caller's transaction."""
    connection.execute("DELETE FROM usage WHERE day < ?", (before_day,))
    connection.execute("DELETE FROM shadow_usage WHERE day < ?", (before_day,))


def _upsert(table: str, num_keys: int, names: Iterable[str]) -> str:
    names = list(names)
    places = ", ".join("?" * (num_keys + len(names)))
    sums = ", ".join(f"{name} = {name} + excluded.{name}" for name in names)
    return f"INSERT INTO {table} VALUES ({places}) ON CONFLICT DO UPDATE SET {sums}"  # noqa: S608


def _values(usage: WorkerUsage) -> list[float]:
    return [getattr(usage, name) for name in FIELDS]
