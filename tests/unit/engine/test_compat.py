from __future__ import annotations

from typing import Any

import pytest

from flashserve.engine.compat import check_config
from flashserve.errors import UnsupportedModelError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
        {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "sliding_window": None},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"quantization_config": None},
    ],
)
def test_what_is_served_exactly_passes(changes: dict[str, Any]) -> None:
    config = {**LLAMA, **changes}
    assert check_config(config) == config["architectures"][0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map"),
        ({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}, "attention sinks"),
        ({"architectures": ["MambaForCausalLM"], "model_type": "mamba"}, "recurrent"),
        ({"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}, "linear"),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, "encoder-decoder"),
        ({"architectures": ["X"], "is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["NewForCausalLM"], "model_type": "new"}, "LlamaForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "SequenceClassification"),
        ({"architectures": None}, "architectures"),
        ({"architectures": [3]}, "architectures"),
        ({"model_type": "mistral"}, "model_type"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"layer_types": 7}, "layer_types"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"vocab_size": -1}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
    ],
)
def test_the_rest_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named) as caught:
        check_config({**LLAMA, **changes})
    assert "\n" not in caught.value.message
