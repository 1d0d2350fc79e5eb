"""An adapter's files are paired into layers and compared with its base, or refused in one line."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.adapters import CONFIG, PREFIX, Q0, Q1, linear, write_adapter, write_base

from flashserve.errors import CheckpointError, DeployError, UnsupportedModelError
from flashserve.store.adapters.layout import AdapterSnapshot, check_base, read_adapter
from flashserve.store.checkpoint.files import DirectoryFiles
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.checkpoint.snapshot import read_snapshot

EMBED = "model.embed_tokens"
F4 = np.float32


def read(directory: Path, max_rank: int = 128) -> AdapterSnapshot:
    return read_adapter(DirectoryFiles(directory), str(directory), "identity", max_rank)


def fit(directory: Path, base: Path) -> None:
    check_base(read(directory), read_layout(base), "org-base")


def embedding(rank: int, vocabulary: int, width: int) -> dict[str, np.ndarray]:
    return {
        f"{PREFIX}{EMBED}.lora_embedding_A": np.zeros((rank, vocabulary), F4),
        f"{PREFIX}{EMBED}.lora_embedding_B": np.zeros((width, rank), F4),
    }


def test_an_adapter_is_read(tmp_path: Path) -> None:
    adapter = read(write_adapter(tmp_path))
    assert [layer.module for layer in adapter.layers] == [Q0, Q1]
    assert [layer.scaling for layer in adapter.layers] == [2.0, 2.0]
    assert adapter.layers[0].weight_shape == (32, 32)
    assert (adapter.rank, adapter.num_parameters) == (4, 4 * 32 * 4)
    assert adapter.targets == ("q_proj",)
    assert adapter.size_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_the_places_of_a_layer_are_those_of_its_bytes(tmp_path: Path) -> None:
    tensors = linear(Q0, 4, 32, 16)
    adapter = read(write_adapter(tmp_path, tensors))
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    a, b = adapter.layers[0].a, adapter.layers[0].b
    assert data[a.begin : a.end] == tensors[f"{PREFIX}{Q0}.lora_A.weight"].tobytes()
    assert data[b.begin : b.end] == tensors[f"{PREFIX}{Q0}.lora_B.weight"].tobytes()
    assert adapter.layers[0].weight_shape == (16, 32)


def test_ranks_may_differ_by_layer(tmp_path: Path) -> None:
    tensors = linear(Q0, 2, 32, 32) | linear(Q1, 8, 32, 32)
    changes = {"rank_pattern": {Q0: 2, Q1: 8}, "alpha_pattern": {Q1: 4}}
    adapter = read(write_adapter(tmp_path, tensors, **changes))
    assert [(layer.rank, layer.scaling) for layer in adapter.layers] == [(2, 4.0), (8, 0.5)]
    assert adapter.rank == 8


def test_an_adapter_that_fits_its_base_is_taken(tmp_path: Path) -> None:
    fit(write_adapter(tmp_path / "a"), write_base(tmp_path / "base"))


def test_embeddings_and_a_tied_head_are_taken(tmp_path: Path) -> None:
    tensors = embedding(4, 50, 32) | linear("lm_head", 4, 32, 50)
    tensors[f"{PREFIX}{EMBED}.base_layer.weight"] = np.zeros((50, 32), F4)
    targets = ["embed_tokens", "lm_head"]
    directory = write_adapter(tmp_path / "a", tensors, target_modules=targets)
    adapter = read(directory)
    assert [(layer.module, layer.is_embedding) for layer in adapter.layers] == [
        ("lm_head", False),
        (EMBED, True),
    ]
    assert [layer.weight_shape for layer in adapter.layers] == [(50, 32), (50, 32)]
    assert [module for module, _ in adapter.copies] == [EMBED]
    fit(directory, write_base(tmp_path / "base"))


def test_a_sharded_adapter_is_read(tmp_path: Path) -> None:
    write_adapter(tmp_path, linear(Q0, 4, 32, 32))
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model-1.safetensors")
    names = dict.fromkeys(linear(Q0, 4, 32, 32), "adapter_model-1.safetensors")
    index = {"weight_map": names}
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    assert [layer.module for layer in read(tmp_path).layers] == [Q0]


@pytest.mark.parametrize("width", [16, 64])
def test_another_base_is_named_with_both_shapes(tmp_path: Path, width: int) -> None:
    with pytest.raises(CheckpointError, match=f"{width} x {width} there and 32 x 32") as caught:
        fit(write_adapter(tmp_path / "a"), write_base(tmp_path / "base", width))
    assert "org-base" in caught.value.message
    assert "trained on 'org/base'" in caught.value.message


def test_a_copy_of_the_wrong_shape_is_another_base(tmp_path: Path) -> None:
    tensors = embedding(4, 50, 32) | {f"{PREFIX}{EMBED}.base_layer.weight": np.zeros((51, 32), F4)}
    directory = write_adapter(tmp_path / "a", tensors, target_modules=["embed_tokens"])
    with pytest.raises(CheckpointError, match="50 x 32 there and 51 x 32"):
        fit(directory, write_base(tmp_path / "base"))


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        ({"target_modules": ["q_proj", "c_attn"]}, None),
        ({"target_modules": ".*c_attn"}, linear("model.layers.0.c_attn", 4, 32, 32)),
        ({"target_modules": "all-linear"}, linear("model.layers.7.c_attn", 4, 32, 32)),
    ],
)
def test_a_module_that_the_base_lacks_is_named(
    tmp_path: Path, changes: dict[str, Any], tensors: Any
) -> None:
    with pytest.raises(CheckpointError, match=r"c_attn.*org-base does not have"):
        fit(write_adapter(tmp_path / "a", tensors, **changes), write_base(tmp_path / "base"))


Q0_A, Q0_B = linear(Q0, 4, 32, 32)


def without(name: str) -> dict[str, np.ndarray]:
    return {key: value for key, value in linear(Q0, 4, 32, 32).items() if key != name}


def with_(name: str, value: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return linear(Q0, 4, 32, 32) | {name: np.zeros((4, 32), F4) if value is None else value}


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        (without(Q0_A), "lora_B of .* but no lora_A"),
        (without(Q0_B), "lora_A of .* but no lora_B"),
        ({}, "no LoRA weights"),
        (with_("model.layers.0.self_attn.q_proj.lora_A.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}{Q0}.lora_A.default.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}../../etc/passwd.lora_A.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}a b.lora_A.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}{'x' * 600}.lora_A.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}.lora_A.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}model.norm.weight"), "no name that PEFT gives"),
        (with_(f"{PREFIX}{EMBED}.lora_embedding_A.weight"), "neither of a layer"),
        (with_(f"{PREFIX}{Q0}.lora_A"), "neither of a layer"),
        (linear("model.layers.0.k_proj", 4, 32, 32), "target_modules do not name"),
        (linear(f"{EMBED}.q_proj", 2, 32, 32), "says rank 4"),
        (with_(Q0_A, np.zeros((4, 32), np.float64)), "in F64"),
        (with_(Q0_A, np.zeros((4, 32), np.int8)), "in I8"),
        (with_(Q0_A, np.zeros((4, 32, 1), F4)), "4 x 32 x 1"),
        (with_(Q0_A, np.zeros((4, 0), F4)), "4 x 0"),
        (with_(Q0_A, np.zeros((3, 32), F4)), "3 x 32 and 32 x 4 .* rank 4"),
        (with_(Q0_B, np.zeros((32, 5), F4)), "4 x 32 and 32 x 5 .* rank 4"),
    ],
)
def test_weights_that_contradict_themselves_are_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], why: str
) -> None:
    with pytest.raises(CheckpointError, match=why) as caught:
        read(write_adapter(tmp_path, tensors))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("tensors", "changes", "why"),
    [
        (linear(EMBED, 4, 32, 50), {"target_modules": ["embed_tokens"]}, "as a linear layer"),
        (
            {key.replace(EMBED, Q0): value for key, value in embedding(4, 32, 32).items()},
            {},
            "as an embedding",
        ),
        (linear("lm_head", 4, 32, 50), {"target_modules": "all-linear"}, "do not name"),
        (None, {"exclude_modules": ["layers.1.self_attn.q_proj"]}, "do not name"),
        (None, {"rank_pattern": {Q1: 8}}, "says rank 8"),
    ],
)
def test_weights_that_contradict_the_configuration_are_refused(
    tmp_path: Path, tensors: Any, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(CheckpointError, match=why):
        read(write_adapter(tmp_path, tensors, **changes))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{PREFIX}{Q0}.lora_magnitude_vector.weight", "DoRA"),
        (f"{PREFIX}lm_head.modules_to_save.weight", "whole module"),
        (f"{PREFIX}{Q0}.lora_B.bias", "bias"),
        (f"{PREFIX}{EMBED}.token_adapter.trainable_tokens_delta", "trained tokens"),
    ],
)
def test_weights_of_other_methods_are_named(tmp_path: Path, name: str, why: str) -> None:
    with pytest.raises(UnsupportedModelError, match=why):
        read(write_adapter(tmp_path, with_(name)))


def test_a_rank_above_the_limit_is_refused_with_the_setting(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"rank 4; at most 3.*engine\.max_lora_rank"):
        read(write_adapter(tmp_path), max_rank=3)


def test_pickled_weights_are_never_read(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"pickled weights \('adapter_model\.bin'\)"):
        read(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor"):
        read(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is truncated"):
        read(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4, 32], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4, 32], "data_offsets": [512, 0]},
        {"dtype": "F32", "shape": [-4, -32], "data_offsets": [0, 512]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 512]},
        {"dtype": "NONE", "shape": [4, 32], "data_offsets": [0, 512]},
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: dict[str, Any]) -> None:
    path = write_adapter(tmp_path) / "adapter_model.safetensors"
    header = json.dumps({Q0_A: entry}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(512))
    with pytest.raises(DeployError, match=r"adapter_model\.safetensors"):
        read(tmp_path)


def test_a_model_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="flashserve deploy NAME SOURCE"):
        read(write_base(tmp_path))


def test_a_model_with_an_adapter_beside_it_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not an adapter alone"):
        read(write_adapter(write_base(tmp_path)))


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    with pytest.raises(CheckpointError, match="flashserve adapter add BASE NAME SOURCE"):
        read_snapshot(DirectoryFiles(tmp_path), str(tmp_path), "identity")


def test_weights_without_a_configuration_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read(tmp_path)


def test_the_configuration_says_on_what_it_was_trained(tmp_path: Path) -> None:
    assert read(write_adapter(tmp_path)).config.base_name == CONFIG["base_model_name_or_path"]
