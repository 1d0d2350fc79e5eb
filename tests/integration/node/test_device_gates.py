"""An engine that computes behind copies, on a device that copies only when it is waited for."""

from __future__ import annotations

import mmap
import pathlib

import pytest
import torch
from tests.integration.node.nodes import MIB, job
from tests.integration.node.tiny import Tiny, make_tiny
from tests.unit.store.device.fake_device import FakeDevice
from tests.unit.store.device.test_bind import Mapped
from torch import nn

from flashserve.config import EngineSettings
from flashserve.engine import gates, loading
from flashserve.engine.engine import Engine
from flashserve.engine.forward import FusedForward
from flashserve.errors import InternalError
from flashserve.node.devicegates import DeviceGates
from flashserve.node.sleeping import Residence
from flashserve.store.checkpoint.order import groups
from flashserve.store.device.bind import bind
from flashserve.store.device.regions import RegisteredArena

torch.set_num_threads(1)

PROMPT, NUM_TOKENS = [1, 2, 3], 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture(params=["fused", "modules"], autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "modules":
        monkeypatch.setattr(FusedForward, "suits", lambda _: False)


class Device:
    """A tiny model on a fake device, its groups not opened."""

    def __init__(self, tiny: Tiny, *, is_one_group: bool = False, **fail_at: int) -> None:
        directory = pathlib.Path(tiny.spec.source)
        self.mapped = Mapped(directory, start=8)
        self.fake = FakeDevice(**fail_at)
        arena = RegisteredArena(
            self.fake, self.mapped.address, self.mapped.num_bytes, piece_bytes=mmap.PAGESIZE
        )
        config = tiny.model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
        self.model: nn.Module = loading.build_skeleton(config, torch.float32)
        bind(self.model, self.mapped.tensors, self.mapped.mapping, None)
        names = groups(tensor.name for tensor in self.mapped.tensors)
        if is_one_group:
            names = (tuple(name for group in names for name in group),)
        self.residence = Residence(self.fake, arena, self.mapped.tensors, names)
        self.residence.bind(self.model)

    def gates(self) -> DeviceGates:
        num_layers = self.model.config.num_hidden_layers
        return DeviceGates(self.residence, gates.num_groups(num_layers))

    def run(self, gates: DeviceGates) -> list[int]:
        engine = Engine(self.model, EngineSettings(kv_bytes=MIB), gates=gates)
        engine.add(job("s", NUM_TOKENS))
        tokens = []
        while engine.has_work:
            tokens += [output.token_id for _, output in engine.step()]
        return tokens


@pytest.mark.parametrize("is_one_group", [False, True])
def test_an_engine_computes_behind_the_copies_also_after_a_sleep(tiny, is_one_group):
    device = Device(tiny, is_one_group=is_one_group)
    expected = tiny.greedy(PROMPT, NUM_TOKENS)
    for _ in range(2):
        opened = device.gates()
        opened.open(device.residence.num_groups)
        assert device.fake.queue  # nothing has been copied yet
        assert not opened.is_open
        assert device.run(opened) == expected
        assert opened.is_open
        device.residence.sleep()
        device.residence.wake(device.mapped.tensors)


def test_a_group_that_is_waited_for_brings_no_later_one(tiny):
    device = Device(tiny)
    opened = device.gates()
    opened.open(device.residence.num_groups)
    num_copies = len(device.fake.queue)
    opened.wait(0)
    assert 0 < len(device.fake.queue) < num_copies
    assert not opened.is_open


def test_a_refused_copy_fails_the_gates_and_leaves_nothing(tiny):
    device = Device(tiny, copy=2)
    opened = device.gates()
    opened.open(device.residence.num_groups)
    with pytest.raises(InternalError, match="no copy today"):
        opened.wait(0)
    assert device.fake.regions == []
