"""Adapters in a worker's own memory, from bytes of the arena."""

from __future__ import annotations

import dataclasses
import json
import mmap
import pathlib
from collections.abc import Iterator

import pytest
import torch
from tests.integration.engine.adapters import Made, Peft, config
from tests.integration.node.tiny import Tiny, make_tiny

from flashserve.config import EngineSettings
from flashserve.errors import CheckpointError, InputError
from flashserve.messages.work import AdapterImage, GenerateJob, LoadModel, LoraLayer
from flashserve.node.hosting import ModelHost
from flashserve.store.checkpoint.layout import read_layout
from flashserve.types import AdapterId, SamplingParams, TensorSlice

MIB = 1 << 20
PROMPT = [1, 2, 3, 4, 5]
TARGETS = ["q_proj", "v_proj", "down_proj"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Bench:
    """A tiny model and adapters of it, one after the other in an arena."""

    def __init__(self, tiny: Tiny) -> None:
        self.arena = mmap.mmap(-1, 4 * MIB)
        directory = pathlib.Path(tiny.spec.source)
        image = (directory / "model.safetensors").read_bytes()
        self.arena.write(image)
        tensors = tuple(
            TensorSlice(item.name, item.dtype, item.shape, item.begin, item.end - item.begin)
            for item in read_layout(directory).tensors
        )
        parsed = json.loads((directory / "config.json").read_text())
        self.order = LoadModel(tiny.spec.model_id, parsed, {}, tensors)
        settings = EngineSettings(kv_bytes=MIB, adapter_bytes=MIB)
        self.host = ModelHost(self.arena, settings)

    def place(self, made: Made) -> AdapterImage:
        """Writes the adapter's bytes; its image."""

        def write(item: TensorSlice) -> TensorSlice:
            offset = self.arena.tell()
            self.arena.write(made.tensors[item.name].contiguous().numpy().tobytes())
            return dataclasses.replace(item, offset=offset)

        layers = tuple(
            LoraLayer(layer.module, layer.scaling, write(layer.a), write(layer.b))
            for layer in made.image.layers
        )
        return AdapterImage(made.adapter_id, layers)

    def run(self, adapter: AdapterId | None) -> list[int]:
        assert self.host.engine is not None
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        self.host.engine.add(GenerateJob("s", tuple(PROMPT), params, adapter_id=adapter))
        tokens = []
        while self.host.engine.has_work:
            tokens += [output.token_id for _, output in self.host.engine.step()]
        return tokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture(scope="module")
def made(tiny: Tiny) -> Peft:
    return Peft(tiny.model, {"x": config(8, TARGETS), "y": config(4, TARGETS)})


def test_a_replica_that_was_stopped_and_started_knows_no_adapter(tiny: Tiny, made: Peft) -> None:
    bench = Bench(tiny)
    images = {name: bench.place(made.image(name)) for name in ("x", "y")}
    expected = {name: made.generate(name, PROMPT, 12) for name in images}
    assert expected["x"] != expected["y"]
    for first, second in (("x", "y"), ("y", "x")):
        bench.host.load(bench.order)
        engine = bench.host.engine
        assert engine is not None
        assert engine.resident_adapters == ()
        engine.put_adapter(images[first])
        assert bench.run(images[first].adapter_id) == expected[first]
        with pytest.raises(InputError, match="not told"):
            bench.run(images[second].adapter_id)
        assert bench.run(None) == tiny.greedy(PROMPT, 12)
        del engine
        bench.host.unload()


def test_an_adapter_outlives_the_bytes_that_it_was_loaded_from(tiny: Tiny, made: Peft) -> None:
    bench = Bench(tiny)
    begin = bench.arena.tell()
    image = bench.place(made.image("x"))
    bench.host.load(bench.order)
    engine = bench.host.engine
    assert engine is not None
    engine.put_adapter(image)
    expected = bench.run(image.adapter_id)
    engine.drop_adapter(image.adapter_id)
    bench.arena[begin : bench.arena.tell()] = bytes(bench.arena.tell() - begin)
    assert bench.run(image.adapter_id) == expected


def test_slices_outside_of_the_arena_end_one_sequence_with_a_clear_error(
    tiny: Tiny, made: Peft
) -> None:
    bench = Bench(tiny)
    image = bench.place(made.image("x"))
    layer = image.layers[0]
    outside = dataclasses.replace(layer.a, offset=len(bench.arena) - 4)
    wrong = dataclasses.replace(image, layers=(dataclasses.replace(layer, a=outside),))
    bench.host.load(bench.order)
    engine = bench.host.engine
    assert engine is not None
    engine.put_adapter(wrong)
    assert bench.run(wrong.adapter_id) == []
    assert isinstance(engine.failed["s"], CheckpointError)
    engine.put_adapter(image)
    assert bench.run(image.adapter_id) == made.generate("x", PROMPT, 12)
