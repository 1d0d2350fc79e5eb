import dataclasses

import pytest
import torch
from tests.unit.store.device.fake_device import FakeArena, FakeDevice
from torch import nn

from flashserve.engine.selfcheck import CheckKey, SelfCheck
from flashserve.errors import CheckpointError, ConflictError, SelfCheckError, UnavailableError
from flashserve.node.residents import Residents
from flashserve.store.device.regions import RegisteredArena
from flashserve.types import ModelId, TensorSlice

torch.set_num_threads(1)

WEIGHT = TensorSlice("weight", "F32", (8, 8), 64, 256)
KEY = CheckKey("checkpoint", "device", "torch.float32", "libraries")


class Worker:
    """A worker with one linear layer that any arena offset can hold."""

    def __init__(self, max_asleep: int = 8, **fail_at: int) -> None:
        self.arena = FakeArena(4096)
        self.put(WEIGHT)
        self.device = FakeDevice(**fail_at)
        registered = RegisteredArena(self.device, self.arena.address, self.arena.num_bytes)
        self.residents = Residents(self.device, registered, max_asleep)
        self.num_built = 0

    def put(self, tensor: TensorSlice) -> None:
        values = torch.arange(64, dtype=torch.float32) / 64
        begin = tensor.offset
        self.arena.bytes[begin : begin + 256] = values.view(torch.uint8).numpy()

    def build(self) -> nn.Module:
        self.num_built += 1
        return nn.Linear(8, 8, bias=False)

    def take(self, key: str = "a", tensor: TensorSlice = WEIGHT) -> nn.Module:
        resident = self.residents.take(key, [tensor], [["weight"]], self.build)
        resident.residence.load()
        return resident.model

    def verify(self, check: SelfCheck) -> bool:
        return self.residents.verify(check, logits)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.linspace(0, 1, 8))


def test_the_model_that_slept_wakes_without_being_built_again():
    worker = Worker()
    first = worker.take()
    worker.device.synchronize()
    expected, address = first.weight.clone(), first.weight.data_ptr()
    assert worker.residents.sleep() == worker.device.regions[0].num_bytes
    assert (worker.residents.asleep, worker.device.mapped_bytes) == (("a",), 0)
    there = dataclasses.replace(WEIGHT, offset=1024)
    worker.put(there)
    worker.put(WEIGHT)
    assert worker.take(tensor=there) is first
    worker.device.synchronize()
    assert (worker.num_built, first.weight.data_ptr()) == (1, address)
    assert torch.equal(first.weight, expected)


def test_copies_run_while_the_module_is_made_and_are_started_once(monkeypatch):
    worker, seen = Worker(), []
    build = worker.build
    monkeypatch.setattr(worker, "build", lambda: seen.append(len(worker.device.queue)) or build())
    for _ in range(2):
        resident = worker.residents.take("a", [WEIGHT], [["weight"]], worker.build, num_open=1)
        resident.residence.wait(0)
        assert torch.equal(resident.model.weight.flatten(), torch.arange(64) / 64)
        worker.residents.sleep()
    assert (seen, len(worker.device.copies)) == ([1], 2)


def test_models_sleep_beside_the_one_that_is_awake_and_the_longest_asleep_go():
    worker = Worker(max_asleep=2)
    models = {}
    for key in "abc":
        models[key] = worker.take(key)
        worker.residents.sleep(ModelId(f"model {key}"))
    assert worker.residents.asleep == ("b", "c")
    assert worker.residents.asleep_ids == ("model b", "model c")
    assert (len(worker.device.regions), worker.device.mapped_bytes) == (2, 0)
    assert worker.take("b") is models["b"]
    assert worker.residents.asleep == ("c",)
    worker.residents.sleep()
    assert worker.take("a") is not models["a"]
    assert worker.num_built == 4
    worker.residents.close()
    assert (worker.device.regions, worker.residents.asleep) == ([], ())


def test_an_awake_model_is_not_replaced():
    worker = Worker()
    worker.take()
    with pytest.raises(ConflictError):
        worker.take()


def test_a_wake_that_computes_something_else_is_told_and_the_model_loaded_anew(tmp_path):
    worker, check = Worker(), SelfCheck(tmp_path, KEY)
    model = worker.take()
    assert not worker.verify(check)  # the first one makes the reference
    worker.residents.sleep()
    worker.take()
    assert worker.verify(check)
    worker.residents.sleep()
    worker.arena.bytes[70] ^= 0x7F
    worker.take()
    with pytest.raises(SelfCheckError, match="the weights on the device are not those"):
        worker.verify(check)
    assert (worker.device.regions, worker.device.mapped_bytes) == ([], 0)
    worker.arena.bytes[70] ^= 0x7F
    assert worker.take() is not model
    assert worker.verify(check)
    assert worker.num_built == 2


def test_a_model_that_cannot_wake_is_loaded_anew():
    worker = Worker(map=1)
    worker.take()
    worker.residents.sleep()
    worker.take()
    assert (worker.num_built, len(worker.device.regions)) == (2, 1)


@pytest.mark.parametrize("failing", ["map", "build"])
def test_a_load_that_fails_leaves_nothing(failing, monkeypatch):
    worker = Worker(**({"map": 0} if failing == "map" else {}))
    if failing == "build":

        def build() -> nn.Module:
            raise CheckpointError("no such weights")

        monkeypatch.setattr(worker, "build", build)
    with pytest.raises((UnavailableError, CheckpointError)):
        worker.take()
    assert worker.device.regions == []
    assert worker.residents.asleep == ()
    assert worker.residents.sleep() == 0
