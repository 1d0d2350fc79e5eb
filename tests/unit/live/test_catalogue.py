"""The durable catalogue: what is written is read back, and damage is told in one line."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import sqlite3
import stat
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
import structlog

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import ArrivalCount, series_of
from flashserve.forecast.days import DAY_MINUTES
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.arrivalrows import SERVER
from flashserve.live.catalogue import _MIGRATIONS, FILE_NAME, Catalogue
from flashserve.live.modelrows import DeployedModel
from flashserve.policy.schedules import Bounds
from flashserve.types import AdapterSpec, ModelId, ModelSpec, Tier

T = TypeVar("T")
A, B = ModelId("a"), ModelId("b/c")


def deployed(model_id: ModelId, **spec: object) -> DeployedModel:
    fields: dict[str, object] = {
        "source": f"/models/{model_id}",
        "size_bytes": 5 << 40,
        "lowest_tier": Tier.REMOTE,
        "keep_alive_s": 0.5,
        "architecture": "LlamaForCausalLM",
        "context_tokens": 8192,
        "has_chat_template": True,
    }
    return DeployedModel(
        ModelSpec(model_id, **{**fields, **spec}),  # type: ignore[arg-type]
        identity="1234",
        directory=Path("/models") / model_id,
        kv_bytes_per_token=1 << 20,
        created_at=1.5e9,
    )


def use(data_dir: Path, act: Callable[[Catalogue], Awaitable[T]]) -> T:
    async def scenario() -> T:
        catalogue = Catalogue(data_dir)
        try:
            await catalogue.open()
            return await act(catalogue)
        finally:
            await catalogue.close()

    return asyncio.run(scenario())


def test_deployed_models_are_there_after_a_restart(tmp_path: Path) -> None:
    bounds = Bounds(1, 4, 8, ("mon-fri 08:00-18:00 min=2", "sat 10:00-12:00 max=1"))
    first = dataclasses.replace(deployed(A), bounds=bounds)
    second = deployed(B, keep_alive_s=None, has_chat_template=False)

    async def write(catalogue: Catalogue) -> None:
        await catalogue.put(second)
        await catalogue.put(deployed(A, size_bytes=1))
        await catalogue.put(first)

    use(tmp_path, write)
    assert use(tmp_path, Catalogue.models) == [first, second]


def test_models_of_a_file_before_bounds_have_none(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        for script in _MIGRATIONS[:2]:
            connection.executescript(script)
        row = ("a", "/models/a", 5 << 40, 0, 0.5, "LlamaForCausalLM", 8192, 1, "1234")
        values = (*row, "/models/a", 1 << 20, 1.5e9)
        connection.execute(f"INSERT INTO models VALUES ({','.join('?' * len(values))})", values)
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    assert use(tmp_path, Catalogue.models) == [deployed(A)]


@pytest.mark.parametrize("schedule", ["", "[1]", '["mon 08:00-18:00"]'])
def test_a_schedule_that_is_none_is_damage(tmp_path: Path, schedule: str) -> None:
    use(tmp_path, lambda catalogue: catalogue.put(deployed(A)))
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("UPDATE models SET schedule = ?", (schedule,))
        connection.commit()
    with pytest.raises(CatalogueError, match=r"model a: .*damaged"):
        use(tmp_path, Catalogue.models)


def test_a_deleted_model_is_gone_with_its_arrivals_and_its_adapters(tmp_path: Path) -> None:
    gone = [A, series_of(A, "x"), series_of(A, "~")]
    kept = [B, ModelId("a!"), ModelId("aa"), series_of(ModelId("aa"), "x")]

    async def act(catalogue: Catalogue) -> None:
        await catalogue.put(deployed(A))
        for minute in (1, DAY_MINUTES):
            await catalogue.add_arrivals([ArrivalCount(name, minute, 1) for name in gone + kept])
        await catalogue.close_days(1)
        await catalogue.delete(A)
        await catalogue.delete(A)

    async def read(catalogue: Catalogue) -> list[list[int]]:
        found = await catalogue.arrival_arrays(gone + kept, 0, DAY_MINUTES)
        return [minutes.tolist() for minutes, _ in found]

    use(tmp_path, act)
    assert use(tmp_path, Catalogue.models) == []
    assert use(tmp_path, read) == [[]] * 3 + [[1, DAY_MINUTES]] * 4


def test_a_deleted_adapter_is_gone_with_its_arrivals(tmp_path: Path) -> None:
    series = series_of(A, "x")

    async def act(catalogue: Catalogue) -> list[ArrivalCount]:
        spec = AdapterSpec("x", 1, A, "/loras/x", 1)
        await catalogue.put_adapter(RegisteredAdapter(spec, 8, 1, (), 0.0))
        await catalogue.add_arrivals([ArrivalCount(series, 1, 1), ArrivalCount(A, 1, 1)])
        await catalogue.delete_adapter("x")
        await catalogue.delete_adapter("x")
        return [*await catalogue.arrivals(series, 0, 9), *await catalogue.arrivals(A, 0, 9)]

    assert use(tmp_path, act) == [ArrivalCount(A, 1, 1)]


def test_arrivals_add_up_over_writes_and_restarts(tmp_path: Path) -> None:
    for _ in range(2):
        use(tmp_path, lambda c: c.add_arrivals([ArrivalCount(A, 7, 2), ArrivalCount(A, 8, 1)]))
    read = use(tmp_path, lambda c: c.arrivals(A, 7, 8))
    assert read == [ArrivalCount(A, 7, 4), ArrivalCount(A, 8, 2)]
    assert use(tmp_path, lambda c: c.arrivals(A, 8, 8)) == [ArrivalCount(A, 8, 2)]


def rows_of(tmp_path: Path, table: str) -> int:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        ((count,),) = connection.execute(f"SELECT count(*) FROM {table}")
    return int(count)


DAYS = [
    *(ArrivalCount(A, minute, 2) for minute in (3, 1439, 1440, 3000)),
    *(ArrivalCount(B, minute, 1) for minute in (3, 4000)),
]


def test_days_that_are_over_take_a_row_for_each_series_and_read_as_before(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> list[ArrivalCount]:
        await catalogue.add_arrivals(DAYS)
        await catalogue.close_days(2)
        # Late ones, to a day that is closed; it is closed anew.
        await catalogue.add_arrivals([ArrivalCount(A, 3, 1), ArrivalCount(A, 4, 1)])
        before = await catalogue.arrivals(A, 0, 9999)
        await catalogue.close_days(2)
        assert await catalogue.arrivals(A, 0, 9999) == before
        return before

    found = use(tmp_path, act)
    assert [(each.minute, each.count) for each in found] == [
        (3, 3),
        (4, 1),
        (1439, 2),
        (1440, 2),
        (3000, 2),
    ]
    assert (rows_of(tmp_path, "arrivals"), rows_of(tmp_path, "arrival_days")) == (2, 3)
    assert use(tmp_path, lambda c: c.arrivals(A, 4, 1440)) == found[1:4]


def test_days_that_are_too_old_are_dropped(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> list[ArrivalCount]:
        await catalogue.add_arrivals(DAYS)
        await catalogue.close_days(2)
        await catalogue.drop_days(1)
        return await catalogue.arrivals(A, 0, 9999)

    assert [each.minute for each in use(tmp_path, act)] == [1440, 3000]


def test_a_damaged_day_is_left_out_and_logged(tmp_path: Path) -> None:
    async def write(catalogue: Catalogue) -> None:
        await catalogue.add_arrivals(DAYS)
        await catalogue.close_days(3)

    use(tmp_path, write)
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        connection.execute("UPDATE arrival_days SET counts = x'0100' WHERE day = 1")
        connection.commit()
    with structlog.testing.capture_logs() as logs:
        found = use(tmp_path, lambda c: c.arrivals(A, 0, 9999))
    assert [each.minute for each in found] == [3, 1439, 3000]
    assert [(line["series"], line["day"]) for line in logs] == [(A, 1)]


@pytest.mark.parametrize("schema", [1, 2])
def test_a_file_of_an_earlier_version_keeps_its_arrivals(tmp_path: Path, schema: int) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / FILE_NAME)) as connection:
        for script in _MIGRATIONS[:schema]:
            connection.executescript(script)
        connection.execute(f"PRAGMA user_version = {schema}")
        rows = [(each.series, each.minute, each.count) for each in DAYS]
        connection.executemany("INSERT INTO arrivals VALUES (?, ?, ?)", rows)
        connection.commit()
    for _ in range(2):
        assert use(tmp_path, lambda c: c.arrivals(A, 0, 9999)) == DAYS[:4]
    ran = use(tmp_path, lambda c: c.arrivals(SERVER, 0, 9999))
    assert [each.minute for each in ran] == list(range(3, 4001))


def test_the_file_is_private(tmp_path: Path) -> None:
    use(tmp_path / "new", Catalogue.models)
    assert stat.S_IMODE((tmp_path / "new" / FILE_NAME).stat().st_mode) == 0o600


def test_a_file_of_a_newer_version_is_refused_and_left_alone(tmp_path: Path) -> None:
    use(tmp_path, Catalogue.models)
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CatalogueError, match=r"newer FlashServe \(schema 99.*upgrade"):
        use(tmp_path, Catalogue.models)


def test_a_file_that_is_no_database_is_told_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"not a database, certainly not" * 100)
    with pytest.raises(CatalogueError, match="damaged; move it away") as caught:
        use(tmp_path, Catalogue.models)
    assert str(tmp_path / FILE_NAME) in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE models SET lowest_tier = 77",
        "UPDATE models SET lowest_tier = -1",
        "DROP TABLE models",
    ],
)
def test_rows_that_make_no_sense_are_damage(tmp_path: Path, damage: str) -> None:
    use(tmp_path, lambda c: c.put(deployed(A)))
    with sqlite3.connect(tmp_path / FILE_NAME) as connection:
        connection.execute(damage)
    connection.close()
    with pytest.raises(CatalogueError, match="damaged; move it away"):
        use(tmp_path, Catalogue.models)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CatalogueError, match=r"Not a directory|File exists"):
        use(tmp_path / "file" / "below", Catalogue.models)
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(CatalogueError, match="Is a directory"):
        use(tmp_path, Catalogue.models)


def test_a_closed_catalogue_says_so() -> None:
    with pytest.raises(CatalogueError, match="is not open"):
        asyncio.run(Catalogue(Path("nowhere")).models())


def test_a_failed_write_leaves_nothing_half_done(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> list[ArrivalCount]:
        wrong = dataclasses.replace(ArrivalCount(A, 1, 1), count="many")  # type: ignore[arg-type]
        with pytest.raises(CatalogueError):
            await catalogue.add_arrivals([ArrivalCount(A, 1, 1), wrong])
        await catalogue.add_arrivals([ArrivalCount(A, 2, 1)])
        return await catalogue.arrivals(A, 0, 9)

    assert use(tmp_path, act) == [ArrivalCount(A, 2, 1)]
    assert use(tmp_path, lambda c: c.arrivals(A, 0, 9)) == [ArrivalCount(A, 2, 1)]
