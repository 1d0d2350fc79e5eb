"""The benchmark's adapters are distinct to the engine, and its ratios pair rounds with rounds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import lora
import lora_served
from flashserve.store.adapters.layout import read_adapter
from flashserve.store.checkpoint.files import DirectoryFiles


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 6)
        self.lm_head = nn.Linear(4, 10)


def test_adapters_differ_though_some_share_their_bytes() -> None:
    arena = lora.Arena(Small())
    images = [arena.image(number, 2) for number in range(6)]
    assert len({image.adapter_id for image in images}) == 6
    assert [layer.module for layer in images[0].layers] == ["proj"]
    first, other = (arena.read(images[number].layers[0].a) for number in (0, 1))
    assert first.shape == (2, 4)
    assert not torch.equal(first, other)


def test_a_peer_that_sat_out_rounds_is_paired_with_those_it_was_in() -> None:
    samples = {"ours": [4.0, 6.0, 100.0], "peer": [2.0, 2.0]}
    assert lora.paired(samples, "ours", "peer") == 2.5


def test_an_adapter_counts_its_pairs_of_matrices() -> None:
    assert lora.adapter_bytes(Small(), 3) == 2 * 3 * (4 + 6)


def test_adapters_of_the_served_bench_are_such_as_peft_saves(tmp_path: Path) -> None:
    linears = {"model.layers.0.self_attn.q_proj": (8, 6)}
    directories = lora_served.write_adapters(tmp_path, linears, 2, 0)
    weights = {(one / "adapter_model.safetensors").read_bytes() for one in directories}
    assert len(weights) == len(directories)
    adapter = read_adapter(DirectoryFiles(directories[0]), "uri", "identity")
    assert (adapter.rank, adapter.targets) == (2, ("q_proj",))
    assert [layer.weight_shape for layer in adapter.layers] == [(6, 8)]
