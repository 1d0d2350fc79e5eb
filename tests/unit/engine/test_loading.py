from __future__ import annotations

from typing import Any

import pytest
import torch

from flashserve.engine import loading
from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.types import TensorSlice

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
MOE: dict[str, Any] = {
    **CONFIG,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 4,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def make_tensors(config: dict[str, Any], dtype: str = "BF16") -> dict[str, TensorSlice]:
    """What the headers of a right checkpoint would say."""
    model = loading.build_skeleton(config, torch.bfloat16)
    return {
        name: TensorSlice(name, dtype, tuple(value.shape), 0, 2 * value.numel())
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }


def test_a_skeleton_has_no_weights_and_the_checkpoints_names() -> None:
    model = loading.build_skeleton(CONFIG, torch.bfloat16)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert not model.training
    assert "model.layers.1.self_attn.q_proj.weight" in model.state_dict()


def test_a_skeleton_keeps_experts_apart_as_checkpoints_do() -> None:
    model = loading.build_skeleton(MOE, torch.float32)
    names = model.state_dict().keys()
    assert "model.layers.0.mlp.experts.2.down_proj.weight" in names
    assert not [name for name in names if "gate_up_proj" in name]
    assert {value.device.type for value in model.state_dict().values()} == {"meta"}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize("config", [CONFIG, MOE])
def test_a_right_checkpoint_is_described(config: dict[str, Any]) -> None:
    tensors = make_tensors(config)
    found = loading.describe(config, tensors.values())
    assert found.architecture == config["architectures"][0]
    assert found.context_tokens == 128
    assert found.kv_bytes_per_token == 2 * 2 * 2 * 4 * 2  # K and V, layers, heads, size, bytes
    assert found.num_parameters == sum(item.num_bytes // 2 for item in tensors.values())


def test_old_frequency_tables_are_ignored() -> None:
    tensors = make_tensors(CONFIG)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    loading.describe(CONFIG, [*tensors.values(), TensorSlice(name, "F32", (2,), 0, 8)])


def test_a_checkpoint_that_contradicts_the_config_is_refused_by_tensor() -> None:
    tensors = make_tensors(CONFIG)
    name = "model.layers.1.mlp.up_proj.weight"
    short = [item for item in tensors.values() if item.name != name]
    with pytest.raises(CheckpointError, match=rf"{name} is missing"):
        loading.describe(CONFIG, short)
    with pytest.raises(CheckpointError, match=rf"{name} has shape \[3, 3\]"):
        loading.describe(CONFIG, [*short, TensorSlice(name, "BF16", (3, 3), 0, 18)])
    extra = TensorSlice("model.layers.2.mlp.up_proj.weight", "BF16", (1,), 0, 2)
    with pytest.raises(CheckpointError, match="belongs to no part"):
        loading.describe(CONFIG, [*tensors.values(), extra])
    with pytest.raises(CheckpointError, match="lm_head"):
        loading.describe({**CONFIG, "tie_word_embeddings": False}, tensors.values())
    with pytest.raises(CheckpointError, match="F8_E4M3"):
        loading.describe(CONFIG, make_tensors(CONFIG, dtype="F8_E4M3").values())
    with pytest.raises(CheckpointError, match="no tensors"):
        loading.describe(CONFIG, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "no-such-function"},
        {"rms_norm_eps": "small"},
        {"rope_theta": "wide"},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"rope_scaling": {"rope_type": "linear", "factor": "x"}},
        {"pad_token_id": 99},
        {"pad_token_id": "a"},
        {"attention_bias": "no"},
        {"hidden_size": 17},
        {"dtype": "float7"},
    ],
)
def test_a_senseless_config_is_refused_in_one_line(changes: dict[str, Any]) -> None:
    with pytest.raises((UnsupportedModelError, CheckpointError)) as caught:
        loading.describe({**CONFIG, **changes}, make_tensors(CONFIG).values())
    assert "\n" not in caught.value.message


def test_auto_computes_in_the_dtype_of_most_bytes() -> None:
    small = TensorSlice("a", "F32", (2,), 0, 8)
    large = TensorSlice("b", "F16", (50,), 8, 100)
    assert loading.choose_dtype("auto", [small, large]) == torch.float16
    assert loading.choose_dtype("bfloat16", [small, large]) == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "generation_config", "ids"),
    [
        ({"eos_token_id": 2}, {}, (2,)),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, (5, 6)),
        ({"eos_token_id": 2}, {"eos_token_id": 0}, (0,)),
        ({}, {"eos_token_id": None}, ()),
        ({"eos_token_id": "x"}, {}, ()),
    ],
)
def test_the_generation_config_says_where_texts_end(
    config: dict[str, Any], generation_config: dict[str, Any], ids: tuple[int, ...]
) -> None:
    assert loading.eos_token_ids(config, generation_config) == ids
