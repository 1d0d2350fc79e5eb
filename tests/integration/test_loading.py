"""load_model gives what from_pretrained gives, wherever the bytes come from, and shares them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from tests.integration.engine.families import reference
from torch import nn
from transformers import AutoModelForCausalLM

from flashserve import load_model
from flashserve.errors import CheckpointError, SourceError, UnsupportedModelError

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
