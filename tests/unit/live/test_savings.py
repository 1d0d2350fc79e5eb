from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest
from tests.unit.control.fake_nodes import model, node

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.control.shadow import Shadow
from flashserve.control.usage import WorkerUsage
from flashserve.errors import CatalogueError
from flashserve.live.catalogue import Catalogue
from flashserve.live.savings import KEPT_DAYS, Savings
from flashserve.live.savingsreport import Line, Report
from flashserve.messages.commands import StartReplica
from flashserve.messages.events import (
    Event,
    ModelDeleted,
    ModelDeployed,
    NodeJoined,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    Tick,
)
from flashserve.policy.baselines import AlwaysOn, FixedKeepAlive
from flashserve.policy.cost import Prices
from flashserve.policy.plans import Facts, Plan
from flashserve.types import ModelId, Phases, RequestId

T = TypeVar("T")
M = ModelId("m")
PRICES = Prices(gpu_per_s=0.01, wait_per_s=0.1, slo_miss=1.0, slo_s=1.0)
DAY_S = 86_400.0
START_S = 2.0


class Rig:
    """A controller with a ten-minute keep-alive whose starts take two seconds."""

    def __init__(self, catalogue: Catalogue, *shadows: Shadow) -> None:
        self.time = 0.0
        self.unix = 20_000 * DAY_S
        self.catalogue = catalogue
        self.savings = Savings(
            "keep-alive-10m", shadows, PRICES, catalogue, lambda: self.time, lambda: self.unix
        )
        self.controller = Controller(PolicySettings(), policy=FixedKeepAlive(600.0))
        self.tell(NodeJoined(node(workers=2)), 0.0)
        self.tell(ModelDeployed(model("m")), 0.0)

    def tell(self, event: Event, at: float) -> list[object]:
        self.unix += at - self.time
        self.time = at
        commands = self.controller.handle(event, at)
        self.savings.observe(event, commands, at)
        return list(commands)

    def request(
        self, name: str, tenant: str, at: float, service_s: float, adapter: str = ""
    ) -> None:
        arrival = RequestArrived(RequestId(name), M, tenant=tenant, adapter=adapter)
        for command in self.tell(arrival, at):
            if isinstance(command, StartReplica):
                at += START_S
                phases = Phases(init_s=START_S)
                self.tell(ReplicaReady(command.node_id, command.replica_id, M, phases), at)
        self.tell(RequestFinished(RequestId(name), 0.1), at + service_s)

    def wait(self, until: float) -> None:
        while (due := self.controller.next_wakeup()) is not None and due < until:
            self.tell(Tick(), due)
        self.tell(Tick(), until)


def always_on() -> Shadow:
    return Shadow(AlwaysOn(), PolicySettings(), PRICES.slo_s)


def play(data_dir: Path, act: Callable[[Catalogue], Awaitable[T]]) -> T:
    async def run() -> T:
        catalogue = Catalogue(data_dir)
        await catalogue.open()
        try:
            return await act(catalogue)
        finally:
            await catalogue.close()

    return asyncio.run(run())


def named(lines: tuple[Line, ...]) -> dict[str, Line]:
    return {line.name: line for line in lines}


def test_the_report_says_who_took_what_and_what_it_saved(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> Report:
        rig = Rig(catalogue, always_on())
        rig.request("a", "acme", 100.0, 10.0)
        rig.request("b", "", 200.0, 8.0, adapter="tone")
        rig.wait(2000.0)
        return await rig.savings.report(7)

    report = play(tmp_path, act)
    assert (report.policy, report.since) == ("keep-alive-10m", "2024-10-04")
    assert report.total.busy_s == pytest.approx(18.0)
    assert report.total.loading_s == pytest.approx(2.0)
    assert report.total.idle_s == pytest.approx(88.0 + 600.0)
    assert report.total.price == pytest.approx(7.08)
    assert report.total.wait_price == pytest.approx(0.2 + 1.0)
    tenants = named(report.tenants)
    assert tenants["acme"].busy_s == pytest.approx(10.0)
    assert tenants["acme"].cold == 1
    assert tenants["default"].idle_s == pytest.approx(600.0)
    assert set(named(report.adapters)) == {"m:tone"}
    (other,) = report.against
    assert other.policy == "always-on"
    assert other.shadow.price == pytest.approx(20.0)
    assert other.live == dataclasses.replace(report.total, name="live")
    assert other.saved == pytest.approx(20.0 - 7.08)
    assert other.saved_fraction == pytest.approx(1 - 7.08 / 20.0)
    assert named(other.models)["m"].cold == 0


def test_what_was_counted_outlives_the_server_and_adds_up(tmp_path: Path) -> None:
    async def serve(catalogue: Catalogue) -> Report:
        rig = Rig(catalogue, always_on())
        rig.request("a", "acme", 100.0, 10.0)
        await rig.savings.flush()
        rig.wait(300.0)
        return await rig.savings.report(1)

    first, second = play(tmp_path, serve), play(tmp_path, serve)
    assert first.total.requests == 1
    assert second.total.requests == 2
    assert second.total.price == pytest.approx(2 * first.total.price)
    assert second.against[0].shadow.price == pytest.approx(2 * first.against[0].shadow.price)


def test_days_are_apart_and_old_ones_are_dropped(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> list[int]:
        rig = Rig(catalogue)
        rig.request("a", "acme", 100.0, 1.0)
        await rig.savings.flush()
        rig.unix += DAY_S
        rig.request("b", "acme", 200.0, 1.0)
        seen = [(await rig.savings.report(days)).total.requests for days in (1, 2)]
        rig.unix += (KEPT_DAYS + 1) * DAY_S
        await rig.savings.flush()
        kept = await catalogue.usage(0)
        return [*seen, sum(usage.requests for usage in kept.usage.values())]

    assert play(tmp_path, act) == [1, 2, 0]


def test_what_cannot_be_written_is_written_later(tmp_path: Path) -> None:
    class Full(Catalogue):
        is_full = True

        async def add_usage(self, day: int, accounts: object) -> None:
            if self.is_full:
                raise CatalogueError("the disk is full")
            await super().add_usage(day, accounts)  # type: ignore[arg-type]

    async def run() -> int:
        catalogue = Full(tmp_path)
        await catalogue.open()
        rig = Rig(catalogue)
        rig.request("a", "acme", 100.0, 1.0)
        await rig.savings.flush()
        assert not (await catalogue.usage(0)).usage
        catalogue.is_full = False
        rig.request("b", "acme", 200.0, 1.0)
        await rig.savings.flush()
        kept = await catalogue.usage(0)
        await catalogue.close()
        return sum(usage.requests for usage in kept.usage.values())

    assert asyncio.run(run()) == 2


def test_a_shadow_that_fails_is_put_aside_and_the_rest_goes_on(tmp_path: Path) -> None:
    class Lying(AlwaysOn):
        name = "lying"

        def plan(self, facts: Facts, now: float) -> Plan:
            raise ZeroDivisionError(f"{facts.model_id} at {now}")

    async def act(catalogue: Catalogue) -> Report:
        lying = Shadow(Lying(), PolicySettings(), PRICES.slo_s)
        rig = Rig(catalogue, lying, always_on())
        rig.request("a", "acme", 100.0, 10.0)
        return await rig.savings.report(1)

    report = play(tmp_path, act)
    assert report.broken == {"lying": "ZeroDivisionError: m at 0.0"}
    assert [other.policy for other in report.against] == ["always-on"]
    assert report.total.requests == 1


def test_a_deleted_model_leaves_the_metrics_and_stays_in_its_days(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> tuple[int, Report]:
        rig = Rig(catalogue, always_on())
        rig.request("a", "acme", 100.0, 10.0)
        rig.savings.gather()
        rig.savings.forget_model(M)
        left = rig.savings.since_start
        return len(left.usage) + len(left.compared), await rig.savings.report(1)

    left, report = play(tmp_path, act)
    assert left == 0
    assert report.total.requests == 1


def test_sums_are_of_all_fields() -> None:
    usage = WorkerUsage(1.0, 2.0, 3.0, 4.0, 5, 6, 7)
    usage.add(usage)
    assert usage == WorkerUsage(2.0, 4.0, 6.0, 8.0, 10, 12, 14)
    assert usage.held_s == 12.0


def test_events_between_the_parts_of_a_flush_are_neither_lost_nor_counted_twice(
    tmp_path: Path,
) -> None:
    async def act(catalogue: Catalogue) -> Report:
        rig = Rig(catalogue, always_on(), Shadow(FixedKeepAlive(600.0), PolicySettings(), 1.0))
        rig.request("a", "acme", 100.0, 10.0)
        rig.wait(150.0)
        flushing = asyncio.create_task(rig.savings.flush())
        for number in range(5):
            rig.request(f"b{number}", "acme", 200.0 + 20 * number, 10.0)
            await asyncio.sleep(0)
        await flushing
        rig.wait(2000.0)
        return await rig.savings.report(7)

    report = play(tmp_path, act)
    assert report.total.requests == 6
    assert report.total.busy_s == pytest.approx(60.0)
    for other in report.against:
        assert other.shadow.requests == other.live.requests == 6
        assert other.shadow.busy_s == pytest.approx(other.live.busy_s) == pytest.approx(60.0)


def test_metrics_forget_a_deleted_model_whatever_it_took_last(tmp_path: Path) -> None:
    async def act(catalogue: Catalogue) -> Rig:
        rig = Rig(catalogue, always_on())
        rig.request("a", "acme", 100.0, 10.0)
        rig.savings.gather()
        assert rig.savings.since_start.usage
        rig.wait(150.0)
        rig.tell(ModelDeleted(M), 160.0)
        rig.savings.forget_model(M)
        rig.savings.gather()
        assert not rig.savings.since_start.usage
        assert not rig.savings.since_start.compared
        report = await rig.savings.report(7)
        assert report.total.idle_s > 0
        return rig

    play(tmp_path, act)
