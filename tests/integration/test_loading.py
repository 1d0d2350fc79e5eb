"""load_model gives what from_pretrained gives, wherever the bytes come from, and shares them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integration.engine.families import FAMILIES, checkpoint, reference
from torch import nn
from transformers import AutoModelForCausalLM

from flashserve import load_model


pytestmark = pytest.mark.integration


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
    for ours, theirs in (
        (dict(model.named_parameters()), dict(wanted.named_parameters())),
        (dict(model.named_buffers()), dict(wanted.named_buffers())),
    ):
        assert list(ours) == list(theirs)
        for name, value in theirs.items():
            assert ours[name].dtype == value.dtype, name
            assert ours[name].requires_grad == value.requires_grad, name
            assert torch.equal(ours[name], value), name  # shapes too
    assert list(model.state_dict()) == list(wanted.state_dict())
    assert ties(model) == ties(wanted)
    assert model.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert model.config.to_dict() == wanted.config.to_dict()
    assert model.config._attn_implementation == wanted.config._attn_implementation
    assert not model.training
    assert model.name_or_path == wanted.name_or_path


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
