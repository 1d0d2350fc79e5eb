"""Which files belong to a checkpoint, by their names alone."""

from pathlib import Path

import pytest
from tests.adapters import write_adapter, write_base

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.files import DirectoryFiles
from flashserve.store.checkpoint.naming import find_weights, is_adapter, small_names
from flashserve.store.sources.local import list_directory


def test_an_adapter_brings_its_configuration_and_weights_only(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "optimizer.pt"):
        (tmp_path / name).write_text("{}")
    names = [file.name for file in list_directory("adapter", tmp_path).files]
    assert names == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_model_is_a_model_whatever_lies_beside_it(tmp_path: Path) -> None:
    write_adapter(write_base(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    assert not is_adapter(names)
    assert find_weights(DirectoryFiles(tmp_path)).names == ("model.safetensors",)
    assert "config.json" in small_names(names)


def test_another_adapter_in_the_same_place_has_another_identity(tmp_path: Path) -> None:
    first = list_directory("adapter", write_adapter(tmp_path)).identity
    assert list_directory("adapter", tmp_path).identity == first
    write_adapter(tmp_path, lora_alpha=9)
    assert list_directory("adapter", tmp_path).identity != first


def test_adapter_weights_alone_are_no_checkpoint(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"but no adapter_config\.json"):
        find_weights(DirectoryFiles(tmp_path))
