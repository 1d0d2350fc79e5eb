"""The generated checkpoint is what its name and its hashes say."""

from __future__ import annotations

import json
import pathlib

import torch
import xxhash
from safetensors.torch import load_file

import checkpoint
from checkpoint import TINY


def read(directory: pathlib.Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def digest(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.view(torch.uint8).numpy())


def test_hashes_are_those_of_the_files(tmp_path: pathlib.Path) -> None:
    digests = checkpoint.write(tmp_path / "model", TINY, seed=1)
    tensors = read(tmp_path / "model")
    assert {name: digest(tensor) for name, tensor in tensors.items()} == digests
    assert sum(tensor.nbytes for tensor in tensors.values()) == TINY.num_bytes


def test_values_are_finite_small_and_of_both_signs(tmp_path: pathlib.Path) -> None:
    checkpoint.write(tmp_path / "model", TINY, seed=1)
    weight = read(tmp_path / "model")["lm_head.weight"].float()
    assert weight.abs().min() >= 0.0078
    assert weight.abs().max() < 0.03125
    assert abs(weight.mean()) < 0.001


def test_shards_hold_the_same_tensors_in_about_equal_files(tmp_path: pathlib.Path) -> None:
    single = checkpoint.write(tmp_path / "single", TINY, seed=1)
    sharded = checkpoint.write(tmp_path / "sharded", TINY, seed=1, num_shards=4)
    assert single == sharded
    files = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(files) == 4
    placed = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    for file in files:
        names = {name for name, shard in placed["weight_map"].items() if shard == file.name}
        assert set(load_file(file)) == names != set()


def test_seeds_differ(tmp_path: pathlib.Path) -> None:
    one = checkpoint.write(tmp_path / "one", TINY, seed=1)
    other = checkpoint.write(tmp_path / "other", TINY, seed=2)
    same = {name for name, found in one.items() if other[name] == found}
    assert same == {name for name in one if "norm" in name}


def test_sizes_are_the_promised_ones() -> None:
    assert 2.4e9 < checkpoint.FULL.num_bytes < 2.6e9
    assert 0.45e9 < checkpoint.QUICK.num_bytes < 0.55e9
