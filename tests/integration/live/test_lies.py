"""A policy that lies and a node that reports nonsense: requests are served, and budgets hold."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
from pathlib import Path

import msgspec
import pytest
from tests.integration.live.fake_node import NODE, FakeNode
from tests.integration.live.test_service import Rig, play, text_of

from flashserve.live import launcher
from flashserve.messages.commands import NodeCommand
from flashserve.messages.events import Staged, WorkersChanged
from flashserve.policy.cost import Prices
from flashserve.policy.plans import Facts, Plan, Policy
from flashserve.policy.registry import make_policy
from flashserve.types import ModelId, Phases, Tier

pytestmark = pytest.mark.integration
NAMES = ("a", "b", "c", "d")
NUM_WORKERS = 2
EXTENT = 2 << 20
NONSENSE = (math.nan, -1.0, math.inf, -math.inf, 0.0, 1e300, 1e-300)


class Strict(FakeNode):
    """Refuses, as an error of the test, an order that exceeds its workers or its memory."""

    def __init__(self) -> None:
        super().__init__(NUM_WORKERS, dram_bytes=3 * EXTENT)
        self.exceeded: list[str] = []

    def execute(self, command: NodeCommand) -> None:
        super().execute(command)
        if len(self._lost) > NUM_WORKERS:
            self.exceeded.append(f"{len(self._lost)} replicas after {command}")
        if len(self._tiers) * EXTENT > self.spec.dram_bytes:
            self.exceeded.append(f"{len(self._tiers)} models in DRAM after {command}")


class Liar:
    """Says of each model what no policy may mean, one thing after the other."""

    name, shares_slots = "liar", True

    def __init__(self) -> None:
        self.num_asked = 0
        replicas = (10**9, -(10**9), 0, 1)
        self._lies = itertools.cycle(
            Plan(number, keep, review, rate, heed, heed)
            for number, keep, review, rate, heed in zip(
                itertools.cycle(replicas),
                NONSENSE,
                NONSENSE[1:] + NONSENSE[:1],
                NONSENSE[2:] + NONSENSE[:2],
                NONSENSE[3:] + NONSENSE[:3],
                strict=False,
            )
        )

    def arrived(self, model_id: ModelId, now: float) -> None:
        pass

    def forget(self, model_id: ModelId) -> None:
        pass

    def plan(self, facts: Facts, now: float) -> Plan:
        self.num_asked += 1
        return next(self._lies)


async def serve_all(rig: Rig, rounds: int = 3) -> None:
    """Every model answers, asked one after the other and all at once."""
    for name in NAMES:
        await rig.deploy(name)
    async with asyncio.timeout(20):
        for _ in range(rounds):
            for name in NAMES:
                _, chunks = await rig.generate(model_id=ModelId(name))
                assert text_of(chunks) == "hello world"
            answers = await asyncio.gather(*(rig.generate(model_id=ModelId(n)) for n in NAMES))
            assert {text_of(chunks) for _, chunks in answers} == {"hello world"}


@pytest.mark.parametrize("max_replicas", [1, 3])
def test_a_policy_that_lies_costs_no_request_and_exceeds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_replicas: int
) -> None:
    liar, node = Liar(), Strict()

    def lie(name: str, prices: Prices) -> Policy:
        return liar if name == "liar" else make_policy(name, prices)

    async def scenario(rig: Rig) -> None:
        await serve_all(rig)
        assert rig.service.is_ready
        report = msgspec.to_builtins(await rig.service.savings.report(1))
        assert not report["broken"]
        json.dumps(report, allow_nan=False)

    monkeypatch.setattr(launcher, "make_policy", lie)
    play(tmp_path, scenario, node, deployed=False, name="liar", max_replicas=max_replicas)
    assert liar.num_asked > len(NAMES)
    assert not node.exceeded


def test_a_shadow_that_lies_changes_nothing_and_gives_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Strict()

    def lie(name: str, prices: Prices) -> Policy:
        return Liar() if name == "liar" else make_policy(name, prices)

    async def scenario(rig: Rig) -> None:
        await serve_all(rig, rounds=1)
        report = msgspec.to_builtins(await rig.service.savings.report(1))
        assert "liar" in {other["policy"] for other in report["against"]}
        json.dumps(report, allow_nan=False)

    monkeypatch.setattr(launcher, "make_policy", lie)
    play(tmp_path, scenario, node, deployed=False, shadow="liar")
    assert not node.exceeded


@pytest.mark.parametrize("seconds", NONSENSE)
def test_a_node_that_reports_nonsense_rates_goes_on_being_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    node = Strict()
    phases = Phases(dram_s=seconds, device_s=seconds, init_s=seconds)
    monkeypatch.setattr("tests.integration.live.fake_node.START", phases)

    async def scenario(rig: Rig) -> None:
        await serve_all(rig, rounds=1)
        for number, name in itertools.product((0, -1, 2**63), (*NAMES, "nobody")):
            node.emit(Staged(NODE, ModelId(name), Tier.DISK, number, seconds))
        await serve_all_again(rig)
        assert rig.service.is_ready
        for model in await rig.service.models():
            json.dumps(msgspec.to_builtins(model), allow_nan=False)

    async def serve_all_again(rig: Rig) -> None:
        async with asyncio.timeout(20):
            for name in NAMES * 2:
                _, chunks = await rig.generate(model_id=ModelId(name))
                assert text_of(chunks) == "hello world"

    play(tmp_path, scenario, node, deployed=False)
    assert not node.exceeded


def test_a_node_that_claims_workers_which_it_has_not_is_given_no_more_than_it_has(
    tmp_path: Path,
) -> None:
    node = Strict()

    async def scenario(rig: Rig) -> None:
        await serve_all(rig, rounds=1)
        for number in (10**9, -1, 0, NUM_WORKERS):
            node.emit(WorkersChanged(NODE, number))
        await serve_all(rig, rounds=1)

    play(tmp_path, scenario, node, deployed=False)
    assert not node.exceeded
