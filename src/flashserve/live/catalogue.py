"""The durable record: models, their adapters, and how many requests each had in each minute.

One SQLite file (WAL). What exists is what was deployed, not what is running: a restarted server
reads its models from here. All calls run in one thread, so that the event loop never waits for the
disk and the connection needs no lock; long work comes in pieces, between which others get a turn.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import ArrivalCount, series_of
from flashserve.live import adapterrows, arrivalrows, modelrows, usagerows
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.arrivalrows import ArrivalArrays, ArrivalRows
from flashserve.live.modelrows import DeployedModel
from flashserve.live.usagerows import Accounts
from flashserve.types import ModelId

FILE_NAME = "catalogue.sqlite"

_MIGRATIONS = (
    """
    CREATE TABLE models (
        model_id TEXT PRIMARY KEY,
        source TEXT NOT NULL,
        size_bytes INTEGER NOT NULL,
        lowest_tier INTEGER NOT NULL,
        keep_alive_s REAL,
        architecture TEXT NOT NULL,
        context_tokens INTEGER NOT NULL,
        has_chat_template INTEGER NOT NULL,
        identity TEXT NOT NULL,
        directory TEXT NOT NULL,
        kv_bytes_per_token INTEGER NOT NULL,
        created_at REAL NOT NULL
    ) STRICT;
    CREATE TABLE arrivals (
        model_id TEXT NOT NULL,
        minute INTEGER NOT NULL,
        count INTEGER NOT NULL,
        PRIMARY KEY (model_id, minute)
    ) STRICT, WITHOUT ROWID;
    """,
    adapterrows.SCHEMA,
    arrivalrows.SCHEMA,
    modelrows.BOUNDS_SCHEMA,
    usagerows.SCHEMA,
)
"""Entry v takes a file from schema version v to v + 1; released entries never change."""
_CONVERSIONS = {2: arrivalrows.convert}
"""What SQL alone cannot do of an entry, after it and within its transaction."""
_SERIES_AT_ONCE = 256

T = TypeVar("T")


class Catalogue:
    """Owns the file; `open` before any other call, `close` at the end.

    Every method raises CatalogueError with one line that names the file and the remedy.
    """

    def __init__(self, data_dir: Path) -> None:
        self.path = data_dir / FILE_NAME
        self._executor = concurrent.futures.ThreadPoolExecutor(1, "catalogue")
        self._connection: sqlite3.Connection | None = None
        self._arrivals: ArrivalRows | None = None

    async def open(self) -> None:
        """Create or open the file and bring it to this version's schema."""
        self._connection = await self._run(lambda: _connect(self.path))
        self._arrivals = await self._run(lambda: ArrivalRows(self._db))

    async def close(self) -> None:
        """Idempotent."""
        if (connection := self._connection) is not None:
            self._connection = self._arrivals = None
            await self._run(connection.close)
        self._executor.shutdown()

    async def models(self) -> list[DeployedModel]:
        """Every deployed model, by name."""
        return await self._run(lambda: _read_models(self._db))

    async def put(self, model: DeployedModel) -> None:
        """Record a deployment, in place of an earlier one of that name.

        On return it outlives a killed process.
        """
        await self._run(lambda: modelrows.write_model(self._db, model))

    async def delete(self, model_id: ModelId) -> None:
        """Forget a model, with its arrivals and those of its adapters."""
        await self._change(lambda db, rows: _delete_model(db, rows, model_id))

    async def adapters(self) -> list[RegisteredAdapter]:
        """Every registered adapter, by name."""
        return await self._run(lambda: _read_adapters(self._db))

    async def take_adapter_version(self, name: str) -> int:
        """A version number that the name has never had, not even before it was deleted."""
        return await self._run(lambda: adapterrows.take_version(self._db, name))

    async def put_adapter(self, adapter: RegisteredAdapter) -> None:
        """Record an adapter, in place of an earlier version of that name."""
        await self._run(lambda: adapterrows.write_adapter(self._db, adapter))

    async def delete_adapter(self, name: str) -> None:
        """Forget an adapter and its arrivals."""
        await self._change(lambda db, rows: _delete_adapter(db, rows, name))

    async def add_arrivals(self, counts: Iterable[ArrivalCount]) -> None:
        """Add to what is recorded; all or nothing."""
        given = list(counts)
        await self._change(lambda _, rows: rows.add(given))

    async def arrivals(
        self, series: ModelId, first_minute: int, last_minute: int
    ) -> list[ArrivalCount]:
        """What is recorded of one series, both ends included, oldest first, no empty minutes."""
        ((minutes, counts),) = await self.arrival_arrays([series], first_minute, last_minute)
        return [
            ArrivalCount(series, minute, int(count))
            for minute, count in zip(minutes.tolist(), counts.tolist(), strict=True)
        ]

    async def arrival_arrays(
        self, series: Sequence[ModelId], first_minute: int, last_minute: int
    ) -> list[ArrivalArrays]:
        """Minutes and counts of many series: [entries] each, oldest first, no empty minutes."""

        def read(names: Sequence[ModelId]) -> list[ArrivalArrays]:
            return [self._rows.read(name, first_minute, last_minute) for name in names]

        found: list[ArrivalArrays] = []
        for first in range(0, len(series), _SERIES_AT_ONCE):
            piece = series[first : first + _SERIES_AT_ONCE]
            found += await self._run(functools.partial(read, piece))
        return found

    async def close_days(self, before_day: int) -> None:
        """Make one blob per series of each day before that one which is still open."""
        while await self._change(lambda _, rows: rows.close(before_day, _SERIES_AT_ONCE)):
            pass

    async def drop_days(self, before_day: int) -> None:
        """Forget all arrivals of closed days before that one."""
        while await self._change(lambda _, rows: rows.drop_oldest(before_day)):
            pass

    async def add_usage(self, day: int, accounts: Accounts) -> None:
        """Add to what is kept of a day; all or nothing."""
        await self._run(lambda: _write_usage(self._db, day, accounts))

    async def usage(self, first_day: int) -> Accounts:
        """What was taken from that day on."""
        return await self._run(lambda: usagerows.read(self._db, first_day))

    async def drop_usage(self, before_day: int) -> None:
        """Forget what was taken before that day."""
        await self._run(lambda: _drop_usage(self._db, before_day))

    @property
    def _db(self) -> sqlite3.Connection:
        if self._connection is None:
            raise CatalogueError(f"catalogue {self.path} is not open")
        return self._connection

    @property
    def _rows(self) -> ArrivalRows:
        if self._arrivals is None:
            raise CatalogueError(f"catalogue {self.path} is not open")
        return self._arrivals

    async def _change(self, change: Callable[[sqlite3.Connection, ArrivalRows], T]) -> T:
        """A change that arrivals have part in: all of it happens, or nothing, in memory too."""

        def within() -> T:
            db, rows = self._db, self._rows
            try:
                with _transaction(db):
                    return change(db, rows)
            except BaseException:
                rows.load()
                raise

        return await self._run(within)

    async def _run(self, call: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, call)
        except (sqlite3.DatabaseError, _DamagedRowError) as error:
            raise CatalogueError(f"catalogue {self.path}: {error}: {_remedy(error)}") from None
        except OSError as error:
            raise CatalogueError(f"catalogue {self.path}: {error.strerror}") from None


class _DamagedRowError(Exception):
    """A row holds a value that this version could never have written."""


def _remedy(error: Exception) -> str:
    """Trouble of the disk passes; anything else SQLite says is damage to the file."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT)
    if isinstance(error, sqlite3.OperationalError) and code != sqlite3.SQLITE_ERROR:
        return "check that the directory can be written and the disk is not full"
    return "the file is damaged; move it away and deploy the models again"


def _connect(path: Path) -> sqlite3.Connection:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        _migrate(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _migrate(connection: sqlite3.Connection, path: Path) -> None:
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if version > len(_MIGRATIONS):
        raise CatalogueError(
            f"catalogue {path} was written by a newer FlashServe (schema {version}, this one"
            f" knows {len(_MIGRATIONS)}): upgrade FlashServe or use another data directory"
        )
    for number, script in enumerate(_MIGRATIONS[version:], start=version + 1):
        # executescript would commit what is open, so it only begins.
        connection.executescript(f"BEGIN; {script}")
        if convert := _CONVERSIONS.get(number - 1):
            convert(connection)
        connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")


def _read_models(connection: sqlite3.Connection) -> list[DeployedModel]:
    try:
        return modelrows.read_models(connection)
    except ValueError as error:
        raise _DamagedRowError(str(error)) from None


def _read_adapters(connection: sqlite3.Connection) -> list[RegisteredAdapter]:
    try:
        return adapterrows.read_adapters(connection)
    except ValueError as error:
        raise _DamagedRowError(str(error)) from None


def _delete_model(connection: sqlite3.Connection, rows: ArrivalRows, model_id: ModelId) -> None:
    connection.execute("DELETE FROM models WHERE model_id = ?", (model_id,))
    rows.forget_model(model_id)


def _delete_adapter(connection: sqlite3.Connection, rows: ArrivalRows, name: str) -> None:
    if base := adapterrows.delete_adapter(connection, name):
        rows.forget(series_of(base, name))


def _write_usage(connection: sqlite3.Connection, day: int, accounts: Accounts) -> None:
    with _transaction(connection):
        usagerows.add(connection, day, accounts)


def _drop_usage(connection: sqlite3.Connection, before_day: int) -> None:
    with _transaction(connection):
        usagerows.drop(connection, before_day)


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
