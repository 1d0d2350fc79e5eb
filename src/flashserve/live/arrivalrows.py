"""Arrivals in the catalogue's file: open days as rows, closed ones a blob each; see catalogue.py.

The open days (today, and whatever the clock named since) are in memory too. Each minute only the
minutes that changed are written, in the order of time, so that a flush touches few pages. A day
that is over becomes one compressed blob per series, and its rows go.
"""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import structlog

from flashserve.forecast.arrivals import ArrivalCount, belongs_to
from flashserve.forecast.core import MAX_COUNT
from flashserve.forecast.days import DAY_MINUTES, DayCounts, day_of
from flashserve.types import ModelId

ArrivalArrays = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
"""Minutes since 1970, and the counts in them."""

SERVER = ModelId("")
"""A series of its own, without a name: the minutes in which the server ran, and so knew of
arrivals. A quiet minute in it had none; of a minute outside it nothing is known."""

SCHEMA = """
    ALTER TABLE arrivals RENAME TO minute_arrivals;
    CREATE TABLE arrivals (
        minute INTEGER NOT NULL,
        series TEXT NOT NULL,
        count INTEGER NOT NULL,
        PRIMARY KEY (minute, series)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE arrival_days (
        series TEXT NOT NULL,
        day INTEGER NOT NULL,
        counts BLOB NOT NULL,
        PRIMARY KEY (series, day)
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX arrival_days_by_day ON arrival_days (day);
    """

_MOST = int(MAX_COUNT)
_log = structlog.get_logger(__name__)


def convert(connection: sqlite3.Connection) -> None:
    """Bring the rows of schemas 1 and 2, one a model and minute, into blobs, and drop them.

    Their servers did not note when they ran: from the first to the last arrival they are taken to.
    """
    rows = connection.execute(
        "SELECT model_id, minute, count FROM minute_arrivals ORDER BY model_id, minute"
    )
    for (series, day), group in itertools.groupby(rows, lambda row: (row[0], day_of(row[1]))):
        counts = DayCounts()
        for _, minute, count in group:
            counts.add(minute % DAY_MINUTES, count)
        _write_day(connection, series, day, counts)
    first, last = connection.execute(
        "SELECT min(minute), max(minute) FROM minute_arrivals"
    ).fetchone()
    connection.execute("DROP TABLE minute_arrivals")
    minutes = () if first is None else range(first, last + 1)
    for day, of_day in itertools.groupby(minutes, day_of):
        ran = DayCounts()
        for minute in of_day:
            ran.add(minute % DAY_MINUTES, 1)
        _write_day(connection, SERVER, day, ran)


class ArrivalRows:
    """What one connection's file says of arrivals. All calls in the connection's thread.

    Methods that change something do it within a transaction of the caller's; when that fails,
    `load` again.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._open: dict[ModelId, dict[int, DayCounts]] = {}
        self.load()

    def load(self) -> None:
        """Read the open days."""
        self._open = {}
        for row in self._connection.execute("SELECT series, minute, count FROM arrivals"):
            self._remember(*row)

    def add(self, counts: Sequence[ArrivalCount]) -> None:
        """Add to what is recorded, in memory once it is written."""
        self._connection.executemany(
            "INSERT INTO arrivals VALUES (?1, ?2, ?3)"
            " ON CONFLICT DO UPDATE SET count = min(count + excluded.count, ?4)",
            [(entry.minute, entry.series, entry.count, _MOST) for entry in counts],
        )
        for entry in counts:
            self._remember(entry.series, entry.minute, entry.count)

    def close(self, before_day: int, limit: int) -> int:
        """Make blobs of open days before that one, at most `limit`; how many were."""
        due = (
            (series, day) for series, days in self._open.items() for day in days if day < before_day
        )
        closed = list(itertools.islice(due, limit))
        for series, day in closed:
            counts = self._open[series].pop(day)
            if not self._open[series]:
                del self._open[series]
            self._delete_rows(series, day, counts)
            # A clock that was set back brings arrivals to a day that had been closed.
            for earlier in self._blobs(series, day, day):
                counts.merge(earlier[1])
            _write_day(self._connection, series, day, counts)
        return len(closed)

    def read(self, series: ModelId, first_minute: int, last_minute: int) -> ArrivalArrays:
        """Minutes and counts of one series, [entries] each, oldest first; both ends included."""
        first_day, last_day = day_of(first_minute), day_of(last_minute)
        found = dict(self._blobs(series, first_day, last_day))
        for day, counts in self._open.get(series, {}).items():
            if first_day <= day <= last_day:
                found.setdefault(day, DayCounts()).merge(counts)
        minutes, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
        for day, counts in sorted(found.items()):
            of_day, value = counts.arrays()
            minutes.append(of_day + day * DAY_MINUTES)
            values.append(value)
        every, value = np.concatenate(minutes), np.concatenate(values)
        is_wanted = (every >= first_minute) & (every <= last_minute)
        return every[is_wanted], value[is_wanted]

    def forget(self, series: ModelId) -> None:
        """Drop every arrival of one series."""
        self._connection.execute("DELETE FROM arrival_days WHERE series = ?", (series,))
        self._forget_open([series])

    def forget_model(self, model_id: ModelId) -> None:
        """Drop the arrivals of a model and of its adapters."""
        # ";" follows ":", so these are the names that begin with "MODEL:".
        self._connection.execute(
            "DELETE FROM arrival_days WHERE series = ? OR (series > ? AND series < ?)",
            (model_id, f"{model_id}:", f"{model_id};"),
        )
        self._forget_open([series for series in self._open if belongs_to(series, model_id)])

    def _forget_open(self, gone: Sequence[ModelId]) -> None:
        for series in gone:
            for day, counts in self._open.pop(series, {}).items():
                self._delete_rows(series, day, counts)

    def _delete_rows(self, series: ModelId, day: int, counts: DayCounts) -> None:
        self._connection.executemany(
            "DELETE FROM arrivals WHERE minute = ? AND series = ?",
            [(day * DAY_MINUTES + minute, series) for minute, _ in counts],
        )

    def drop_oldest(self, before_day: int) -> bool:
        """Forget the oldest closed day if it is before that one; whether there was such a day."""
        (day,) = self._connection.execute("SELECT min(day) FROM arrival_days").fetchone()
        if day is None or day >= before_day:
            return False
        self._connection.execute("DELETE FROM arrival_days WHERE day = ?", (day,))
        return True

    def _blobs(
        self, series: ModelId, first_day: int, last_day: int
    ) -> Iterator[tuple[int, DayCounts]]:
        """A damaged one is left out and logged: the other days are as good as they were."""
        rows = self._connection.execute(
            "SELECT day, counts FROM arrival_days WHERE series = ? AND day BETWEEN ? AND ?",
            (series, first_day, last_day),
        )
        for day, blob in rows:
            try:
                yield day, DayCounts.unpack(blob)
            except ValueError as error:
                _log.warning("arrivals not read", series=series, day=day, reason=str(error))

    def _remember(self, series: ModelId, minute: int, count: int) -> None:
        days = self._open.setdefault(series, {})
        days.setdefault(day_of(minute), DayCounts()).add(minute % DAY_MINUTES, count)


def _write_day(
    connection: sqlite3.Connection, series: ModelId, day: int, counts: DayCounts
) -> None:
    connection.execute(
        "INSERT OR REPLACE INTO arrival_days VALUES (?, ?, ?)", (series, day, counts.pack())
    )
