"""A forward that runs while weights arrive: it waits for each part, and computes the same."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from tests.integration.engine.families import FAMILIES, checkpoint, generate, reference
from tests.integration.engine.support import job, prompt_of

from flashserve.config import EngineSettings
from flashserve.engine import gates, loading
from flashserve.engine.engine import Engine
from flashserve.engine.gates import Gates
from flashserve.errors import CheckpointError
from flashserve.store.checkpoint import order
from flashserve.store.device.bind import Pending, bind_arriving
from flashserve.types import TensorSlice

_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
NUM_GROUPS = gates.num_groups(2)


class Delivery:
    """A checkpoint whose bytes come group by group into memory that holds NaN until then.

    start: where in memory the first tensor lies; an odd one makes every tensor a copy.
    """

    def __init__(self, family: str, stored: torch.dtype = torch.float32, start: int = 0) -> None:
        weights = {
            name: value.to(stored).contiguous()
            for name, value in checkpoint(reference(family)).items()
        }
        self.data = {n: v.reshape(-1).view(torch.uint8).numpy() for n, v in weights.items()}
        ends = np.cumsum([start, *(-(-data.nbytes // 8) * 8 for data in self.data.values())])
        self.memory = np.full(ends[-1], 0xFF, np.uint8)
        self.slices = tuple(
            TensorSlice(name, _NAMES[stored], tuple(value.shape), int(begin), value.nbytes)
            for (name, value), begin in zip(weights.items(), ends[:-1], strict=True)
        )
        self.groups = order.groups(weights)
        assert len(self.groups) == NUM_GROUPS
        self.gates = Gates(NUM_GROUPS)
        group_of = {name: g for g, names in enumerate(self.groups) for name in names}
        model = loading.build_skeleton(FAMILIES[family], torch.float32)
        view = memoryview(self.memory)
        self.pending: Pending = bind_arriving(model, self.slices, view, torch.float32, group_of)
        settings = EngineSettings(kv_bytes=1 << 20, block_tokens=8, max_batch_tokens=16)
        self.engine = Engine(model, settings, gates=self.gates)

    def bring(self, group: int) -> None:
        for item in self.slices:
            if item.name in self.groups[group]:
                self.memory[item.offset : item.offset + item.num_bytes] = self.data[item.name]
        self.pending.fill(group + 1)
        self.gates.open(group + 1)

    def is_waited_for(self) -> bool:
        return self.gates._waiting_since is not None


class Stepping:
    """An engine that is stepped by a thread of its own until all is done."""

    def __init__(self, engine: Engine) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.error: CheckpointError | None = None
        self._engine = engine
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while self._engine.has_work:
                for name, output in self._engine.step():
                    self.tokens.setdefault(name, []).append(output.token_id)
        except CheckpointError as error:
            self.error = error

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def end(self) -> None:
        self._thread.join(60)
        assert not self.is_running


def deliver(delivery: Delivery, stepping: Stepping, num_groups: int = NUM_GROUPS) -> None:
    """Brings group after group, each only when a step waits for it."""
    for group in range(num_groups):
        while not delivery.is_waited_for():
            assert stepping.is_running
        assert stepping.tokens == {}
        since = delivery.gates._waiting_since
        delivery.bring(group)
        while delivery.gates._waiting_since == since:
            pass


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_token_follows_the_last_group_and_all_are_as_ever(family: str) -> None:
    delivery = Delivery(family)
    prompts = {"long": prompt_of(30), "short": prompt_of(5, seed=1)}
    for name, prompt in prompts.items():
        delivery.engine.add(job(name, prompt, 8))
    stepping = Stepping(delivery.engine)
    deliver(delivery, stepping)
    stepping.end()
    model = reference(family)
    assert stepping.tokens == {n: generate(model, prompt, 8) for n, prompt in prompts.items()}
    assert delivery.engine.waited_s > 0
    delivery.engine.add(job("again", prompts["long"], 8))
    again = Stepping(delivery.engine)
    again.end()
    assert again.tokens == {"again": stepping.tokens["long"]}


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3-moe", "gemma3"])
@pytest.mark.parametrize("how", [{"start": 1}, {"stored": torch.bfloat16}])
def test_copies_are_made_of_what_has_arrived(family: str, how: dict[str, object]) -> None:
    delivery = Delivery(family, **how)  # type: ignore[arg-type]
    prompt = prompt_of(20)
    delivery.engine.add(job("x", prompt, 6))
    stepping = Stepping(delivery.engine)
    deliver(delivery, stepping)
    stepping.end()
    whole = Delivery(family, **how)  # type: ignore[arg-type]
    for group in range(NUM_GROUPS):
        whole.bring(group)
    whole.engine.add(job("x", prompt, 6))
    expected = Stepping(whole.engine)
    expected.end()
    assert stepping.tokens == expected.tokens
    assert whole.engine.waited_s == 0
    if "start" in how:
        assert stepping.tokens == {"x": generate(reference(family), prompt, 6)}


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("num_open", range(NUM_GROUPS))
def test_an_arrival_that_fails_ends_the_step_and_leaves_an_engine_that_can_be_emptied(
    family: str, num_open: int
) -> None:
    delivery = Delivery(family)
    delivery.engine.add(job("x", prompt_of(12), 8))
    stepping = Stepping(delivery.engine)
    deliver(delivery, stepping, num_open)
    delivery.gates.fail(CheckpointError("the rest is damaged"))
    stepping.end()
    assert stepping.error is not None
    assert stepping.error.message == "the rest is damaged"
    assert stepping.tokens == {}
    delivery.engine.abort("x")
    assert not delivery.engine.has_work
    assert delivery.engine.kv_usage().used == 0


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_once_all_is_there_nothing_is_left_of_the_gates(family: str) -> None:
    delivery = Delivery(family)
    for group in range(NUM_GROUPS):
        delivery.bring(group)
    delivery.engine.add(job("x", prompt_of(5), 2))
    Stepping(delivery.engine).end()
    forward = delivery.engine._runner._forward
    assert forward._gates is None  # type: ignore[attr-defined]
    delivery.gates.fail(CheckpointError("nobody asks any more"))
    delivery.engine.add(job("y", prompt_of(5), 2))
    after = Stepping(delivery.engine)
    after.end()
    assert len(after.tokens["y"]) == 2


def test_prompt_tokens_from_the_cache_are_told_with_the_first_token() -> None:
    delivery = Delivery("llama")
    for group in range(NUM_GROUPS):
        delivery.bring(group)
    engine = delivery.engine
    told = []
    for name in ("first", "second"):
        engine.add(job(name, prompt_of(20), 3))
        while engine.has_work:
            engine.step()
            told.append(dict(engine.reused))
    assert told == [{}, {"first": 0}, {}, {}, {"second": 16}, {}, {}]
