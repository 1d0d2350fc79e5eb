"""Schedules reach the controller as they begin and end."""

from __future__ import annotations

import asyncio
import datetime
from pathlib import Path

import pytest
from tests.integration.live.fake_node import FakeNode
from tests.unit.live.tiny import write_text

from flashserve.config import DeploySettings, PolicySettings, ScalingSettings
from flashserve.control.controller import Controller
from flashserve.live.bounds import BoundsClock
from flashserve.live.catalogue import Catalogue
from flashserve.live.deployments import Deployments, DeployOptions
from flashserve.live.names import Names
from flashserve.live.runtime import Runtime
from flashserve.messages.events import BoundsChanged
from flashserve.policy.schedules import Bounds
from flashserve.types import ModelId, Scaling

pytestmark = pytest.mark.integration
M = ModelId("m")
MONDAY = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC).timestamp()


def test_the_controller_hears_once_of_each_change(tmp_path: Path) -> None:
    times = [7.0, 7.9, 8.0, 8.1, 12.0, 6.0, 17.9, 18.0]
    hours = [times[0]]

    async def run() -> list[BoundsChanged]:
        runtime = Runtime(Controller(PolicySettings()), [FakeNode()])
        catalogue = Catalogue(tmp_path)
        clock = BoundsClock(ScalingSettings(timezone="UTC"), lambda: MONDAY + hours[-1] * 3600)
        deployments = Deployments(
            DeploySettings(), clock, runtime, catalogue, tmp_path, Names(), lambda _: ()
        )
        write_text(tmp_path / "checkpoint")
        await catalogue.open()
        await runtime.start()
        options = DeployOptions(bounds=Bounds(schedule=("mon 08:00-18:00 min=1",)))
        source = str(tmp_path / "checkpoint")
        await deployments.deploy(M, source, options, trusted=True, replace=False)
        heard: list[BoundsChanged] = []
        with runtime.watch() as watch:
            for hour in times:
                hours.append(hour)
                deployments.follow_schedules()
            await runtime.apply(BoundsChanged(ModelId("end"), Scaling()))
            while not watch.empty():
                event, _ = watch.get_nowait()
                if isinstance(event, BoundsChanged) and event.model_id == M:
                    heard.append(event)
        await runtime.close()
        await catalogue.close()
        return heard

    least = [event.scaling.min_replicas for event in asyncio.run(run())]
    assert least == [1, 0, 1, 0]
