"""load_model gives what from_pretrained gives, wherever the bytes come from, and shares them."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from tests.integration.engine.families import reference
from torch import nn
from transformers import AutoModelForCausalLM

from flashserve import load_model, open_snapshot
from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, ConflictError, SourceError, UnsupportedModelError
from flashserve.node.sockets import bind_unix_socket
from flashserve.store.handout.client import socket_path
from flashserve.store.handout.server import Handout
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration
DEMO = Path(__file__).parents[2] / ".demo" / "models" / "smollm2"


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def save(family: str, directory: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A tiny model of a family, saved by transformers."""
    reference(family, dtype).save_pretrained(directory, **options)
    return directory


def assert_equal(model: nn.Module, wanted: nn.Module) -> None:
    """The same class, weights, buffers, ties and settings."""
    assert type(model) is type(wanted)
    assert_same_weights(model, wanted)
    assert list(model.state_dict()) == list(wanted.state_dict())
    assert ties(model) == ties(wanted)
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert model.config.to_dict() == wanted.config.to_dict()
    assert model.config._attn_implementation == wanted.config._attn_implementation
    assert not model.training
    assert model.name_or_path == wanted.name_or_path


def assert_same_weights(model: nn.Module, wanted: nn.Module) -> None:
    for ours, theirs in (
        (dict(model.named_parameters()), dict(wanted.named_parameters())),
        (dict(model.named_buffers()), dict(wanted.named_buffers())),
    ):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert ours[name].requires_grad == value.requires_grad, name
            assert torch.equal(ours[name], value), name  # shapes too


def ties(model: nn.Module) -> set[frozenset[str]]:
    names: dict[int, set[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        names.setdefault(value.data_ptr(), set()).add(name)
    return {frozenset(group) for group in names.values()}


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gemma2", "gemma3"])
def test_a_model_is_the_one_that_from_pretrained_returns(family, tmp_path):
    path = save(family, tmp_path / "model")
    model = load_model(path, data_dir=tmp_path / "data")
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))


@pytest.mark.parametrize("family", ["llama", "llama-bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sharded_half_precision_and_tied_weights_are_as_from_pretrained_has_them(
    family, dtype, tmp_path
):
    path = save(family, tmp_path / "model", dtype, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    model = load_model(path, data_dir=tmp_path / "data")
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))
    assert model.dtype == dtype
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    assert (ties(model) & {frozenset(tied)} == {frozenset(tied)}) == (family == "llama")


def narrow(path: Path, dtype: torch.dtype, *, scaled: bool) -> None:
    """Makes the linear weights of a saved model 8 bits wide; `scaled` puts a scale beside each."""
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name in [name for name in tensors if "_proj" in name]:
        scale = tensors[name].abs().max().float() / 100
        tensors[name] = (tensors[name].float() / scale).to(dtype)
        if scaled:
            tensors[f"{name}_scale_inv"] = scale.view(1, 1)
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_weights_of_8_bits_become_what_from_pretrained_makes_of_them(dtype, tmp_path):
    path = save("llama", tmp_path / "model", torch.bfloat16)
    narrow(path, dtype, scaled=False)
    model = load_model(path, data_dir=tmp_path / "data")
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))
    assert model.model.layers[0].mlp.up_proj.weight.any()


def test_an_fp8_checkpoint_with_scales_is_the_one_that_from_pretrained_returns(tmp_path):
    path = save("llama", tmp_path / "model", torch.bfloat16)
    wanted = AutoModelForCausalLM.from_pretrained(path)
    narrow(path, torch.float8_e4m3fn, scaled=True)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "dequantize": True,  # as transformers does on a processor
    }
    (path / "config.json").write_text(json.dumps(config))
    model = load_model(path, data_dir=tmp_path / "data")
    assert_same_weights(model, AutoModelForCausalLM.from_pretrained(path))
    for name, value in wanted.named_parameters():
        assert torch.allclose(model.get_parameter(name), value, rtol=0.1, atol=0.01), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto"], ids=str)
def test_a_wanted_dtype_converts_as_from_pretrained_does(dtype, tmp_path):
    path = save("llama", tmp_path / "model")
    model = load_model(path, data_dir=tmp_path / "data", dtype=dtype)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path, dtype=dtype))


def test_a_checkpoint_without_dtype_or_generation_config_is_as_from_pretrained_has_it(tmp_path):
    path = save("llama", tmp_path / "model", torch.bfloat16)
    (path / "generation_config.json").unlink()
    config = json.loads((path / "config.json").read_text())
    del config["dtype"]
    (path / "config.json").write_text(json.dumps(config))
    model = load_model(path, data_dir=tmp_path / "data")
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))
    assert model.dtype == torch.bfloat16


def test_a_published_generation_config_that_is_not_quite_valid_can_be_saved_again(tmp_path):
    path = save("llama", tmp_path / "model")
    generation = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    (path / "generation_config.json").write_text(json.dumps(generation))
    model = load_model(path, data_dir=tmp_path / "data")
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same_weights(saved, model)


def test_the_real_model_is_the_one_that_from_pretrained_returns(tmp_path):
    if not (DEMO / "model.safetensors").is_file():
        pytest.skip("make model has not been run")
    model = load_model(DEMO, data_dir=tmp_path)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(DEMO))


def test_a_model_trains_and_merges_in_place_without_touching_its_source(tmp_path):
    path = save("llama", tmp_path / "model")
    before = (path / "model.safetensors").read_bytes()
    model, other = (load_model(path, data_dir=tmp_path / "data") for _ in range(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.tensor([[1, 2, 3, 4]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    with torch.no_grad():
        model.model.norm.weight += 1.0
    wanted = AutoModelForCausalLM.from_pretrained(path)
    assert_equal(other, wanted)
    changed = [
        name
        for name, value in wanted.named_parameters()
        if not torch.equal(value, model.get_parameter(name))
    ]
    assert len(changed) == len(list(wanted.parameters()))
    assert (path / "model.safetensors").read_bytes() == before


def test_a_missing_source_is_one_line(tmp_path):
    for source in (tmp_path / "nowhere", "some-name", "ftp://host/x"):
        with pytest.raises(SourceError, match=re.escape(str(source))) as caught:
            load_model(source, data_dir=tmp_path / "data")
        assert "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(tmp_path):
    path = save("llama", tmp_path / "model")
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    del tensors["model.norm.weight"]
    safetensors.torch.save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        load_model(path, data_dir=tmp_path / "data")


@pytest.mark.parametrize("changes", [{"model_type": "nothing"}, {"model_type": "t5"}])
def test_a_config_that_makes_no_such_model_is_refused(changes, tmp_path):
    path = save("llama", tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UnsupportedModelError, match=r"nothing|t5"):
        load_model(path, data_dir=tmp_path / "data")


def test_the_package_imports_no_tensor_library_before_it_is_asked_to():
    check = (
        "import sys, flashserve; assert 'numpy' not in sys.modules; "
        "from flashserve import open_snapshot; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


@pytest.fixture
def node(tmp_path) -> Iterator[Node]:
    """A running node without workers' models, on a loop in a thread of its own."""
    with Node(tmp_path / "data") as running:
        yield running


class Node:
    """A handout over a store, as an agent runs it."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def __enter__(self) -> Node:
        self._thread.start()
        self.store = Store(self.data_dir, 64 << 20, prefault=False)
        self.listener = bind_unix_socket(socket_path(self.data_dir))
        self.models: dict[ModelId, ModelSpec] = {}
        self.handout = Handout(
            self.listener.socket,
            self.store,
            self.data_dir,
            lambda: self.models,
            StoreSettings(handout_bytes=64 << 20, handout_keep_s=0),
        )
        self._loop.call_soon_threadsafe(self.handout.start)
        return self

    def deploy(self, name: str, path: Path, *, stage: bool = True) -> None:
        model = ModelSpec(ModelId(name), str(path), 0)
        self.models[model.model_id] = model
        if stage:
            self.store.stage(model, Tier.DRAM)

    def until_no_client(self) -> None:
        while self.handout.num_clients:
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self.handout.close(), self._loop).result()
        self.listener.close()
        self.store.close()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def test_a_model_from_a_node_is_the_one_that_from_pretrained_returns(node, tmp_path):
    path = save("qwen3-moe", tmp_path / "model", torch.bfloat16, max_shard_size="20KB")
    node.deploy("moe", path)
    wanted = AutoModelForCausalLM.from_pretrained(path)
    assert_equal(load_model(path, data_dir=node.data_dir), wanted)
    named = load_model("moe", data_dir=node.data_dir)
    assert_same_weights(named, wanted)
    assert named.name_or_path == str(path)
    assert node.handout.copied_bytes > 0


def test_one_process_writes_in_place_and_another_does_not_see_it(node, tmp_path):
    path = save("llama", tmp_path / "model")
    node.deploy("llama", path)
    model, other = (load_model("llama", data_dir=node.data_dir) for _ in range(2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert_same_weights(other, AutoModelForCausalLM.from_pretrained(path))
    third = load_model("llama", data_dir=node.data_dir)
    assert_same_weights(third, other)
    node.store.verify(ModelId("llama"))


def test_the_lease_lasts_as_long_as_any_tensor(node, tmp_path):
    node.deploy("llama", save("llama", tmp_path / "model"))
    model = load_model("llama", data_dir=node.data_dir)
    kept = model.model.norm.weight.detach()[3:]
    before = kept.clone()
    assert node.handout.num_clients == 1
    del model
    gc.collect()
    assert node.handout.num_clients == 1
    assert torch.equal(kept, before)
    del kept
    gc.collect()
    node.until_no_client()
    assert node.handout.copied_bytes == 0


def test_a_process_that_is_killed_gives_up_its_lease(node, tmp_path):
    node.deploy("llama", save("llama", tmp_path / "model"), stage=False)
    holder = (
        "import sys; from flashserve import load_model; "
        "model = load_model('llama', data_dir=sys.argv[1]); "
        "print(float(model.model.norm.weight.detach().sum()), flush=True); sys.stdin.readline()"
    )
    command = [sys.executable, "-c", holder, str(node.data_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        wanted = reference("llama", torch.float32).model.norm.weight.detach().sum()
        assert float(process.stdout.readline()) == pytest.approx(float(wanted))
        assert node.handout.num_clients == 1
        process.kill()
    node.until_no_client()
    assert node.handout.copied_bytes == 0
    assert node.store.usage().used == 0


def test_tensors_stay_after_the_node_is_gone(tmp_path):
    path = save("llama", tmp_path / "model")
    with Node(tmp_path / "data") as node:
        model = load_model(path, data_dir=node.data_dir)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(path))


NUMBERS = {
    "f32": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "f16": torch.arange(4, dtype=torch.float16),
    "i8": torch.arange(-3, 4, dtype=torch.int8),
    "u8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "i64": torch.arange(3),
    "bf16": torch.arange(6, dtype=torch.bfloat16).reshape(3, 2),
    "fp8": torch.arange(6, dtype=torch.float32).to(torch.float8_e4m3fn).reshape(3, 2),
    "fp8-e5": torch.arange(3, dtype=torch.float32).to(torch.float8_e5m2),
    "empty": torch.empty(0, 4),
}


def save_numbers(directory: Path) -> Path:
    directory.mkdir()
    safetensors.torch.save_file(NUMBERS, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


def test_a_snapshot_has_every_tensor_of_every_type(tmp_path):
    path = save_numbers(tmp_path / "model")
    with open_snapshot(path, data_dir=tmp_path / "data") as tensors:
        assert set(tensors) == set(NUMBERS)
        assert len(tensors) == len(NUMBERS)
        for name, wanted in NUMBERS.items():
            tensor = tensors[name]
            assert tuple(tensor.shape) == tuple(wanted.shape)
            if isinstance(tensor, np.ndarray):
                assert tensor.dtype == wanted.numpy().dtype
                assert np.array_equal(tensor, wanted.numpy())
                assert not tensor.flags.writeable
            else:
                bits = wanted.view(torch.uint16 if name == "bf16" else torch.uint8)
                assert np.array_equal(tensor.numpy(), bits.numpy())
                assert bytes(tensor.data) == bits.numpy().tobytes()
                assert tensor.data.readonly
                assert tensor.torch().dtype == wanted.dtype
                assert torch.equal(tensor.torch().float(), wanted.float())
        names = {name: tensors[name].dtype for name in ("bf16", "fp8", "fp8-e5")}
        assert names == {"bf16": "BF16", "fp8": "F8_E4M3", "fp8-e5": "F8_E5M2"}
        with pytest.raises(KeyError):
            tensors["other"]


NUMPY_USER = """
import sys
import numpy
from flashserve import open_snapshot

with open_snapshot(sys.argv[1], data_dir=sys.argv[2]) as tensors:
    for name in ("f32", "f16", "i8", "bool"):
        print(name, tensors[name].dtype, tensors[name].sum())
    for name in ("bf16", "fp8", "fp8-e5"):
        print(tensors[name].dtype, tensors[name].numpy().dtype, tensors[name].shape)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""


def test_a_user_of_numpy_needs_no_torch(node, tmp_path):
    path = save_numbers(tmp_path / "model")
    for data_dir in (node.data_dir, tmp_path / "nobody"):
        command = [sys.executable, "-c", NUMPY_USER, str(path), str(data_dir)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert output.splitlines() == [
            "f32 float32 15.0",
            "f16 float16 6.0",
            "i8 int8 0",
            "bool bool 1",
            "BF16 uint16 (3, 2)",
            "F8_E4M3 uint8 (3, 2)",
            "F8_E5M2 uint8 (3,)",
        ]


def test_a_sharded_snapshot_has_the_tensors_of_all_its_files(node, tmp_path):
    path = save("llama", tmp_path / "model", torch.float16, max_shard_size="20KB")
    wanted = {
        name: tensor
        for file in path.glob("*.safetensors")
        for name, tensor in safetensors.torch.load_file(file).items()
    }
    assert len(list(path.glob("*.safetensors"))) > 1
    for data_dir in (node.data_dir, tmp_path / "nobody"):
        with open_snapshot(path, data_dir=data_dir) as tensors:
            assert set(tensors) == set(wanted)
            for name, tensor in wanted.items():
                assert np.array_equal(tensors[name], tensor.numpy()), name


def test_a_closed_snapshot_has_given_up_its_lease_and_refuses_without_a_crash(node, tmp_path):
    path = save_numbers(tmp_path / "model")
    with open_snapshot(path, data_dir=node.data_dir) as tensors:
        array, raw = tensors["f32"], tensors["bf16"]
        assert node.handout.num_clients == 1
    node.until_no_client()
    for access in (lambda: tensors["f32"], raw.numpy, raw.torch):
        with pytest.raises(ConflictError, match="closed"):
            access()
    assert np.array_equal(array, NUMBERS["f32"].numpy())


def test_a_tensor_may_be_written_to_where_it_was_handed_out_and_nowhere_else(node, tmp_path):
    path = save_numbers(tmp_path / "model")
    with open_snapshot(path, data_dir=node.data_dir) as tensors:
        tensors["bf16"].torch().zero_()
        assert not tensors["bf16"].numpy().any()
        with open_snapshot(path, data_dir=node.data_dir) as others:
            assert torch.equal(others["bf16"].torch(), NUMBERS["bf16"])
