"""An adapter_config.json is read as PEFT means it, or refused with one line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.errors import CheckpointError, DeployError, UnsupportedModelError
from flashserve.store.adapters.config import LoraConfig, parse_config, read_config
from flashserve.store.checkpoint.files import DirectoryFiles

GOOD: dict[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "modules_to_save": None,
    "use_dora": False,
}
Q = "model.layers.3.self_attn.q_proj"


def parse(**changes: Any) -> LoraConfig:
    return parse_config({**GOOD, **changes}, "adapter_config.json")


def test_alpha_over_rank_scales() -> None:
    assert parse().rank_of(Q) == 8
    assert parse().scaling_of(Q) == 2.0
    assert parse(use_rslora=True).scaling_of(Q) == 16 / math.sqrt(8)


def test_patterns_change_rank_and_alpha_of_the_modules_that_they_fit() -> None:
    config = parse(
        rank_pattern={"layers.3.self_attn.q_proj": 4, "q_proj": 2},
        alpha_pattern={r"layers\.\d+\.self_attn\.q_proj": 32},
    )
    assert (config.rank_of(Q), config.scaling_of(Q)) == (4, 8.0)
    assert config.rank_of("model.layers.4.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.4.self_attn.v_proj") == 8
    assert config.max_rank == 8


@pytest.mark.parametrize(
    ("changes", "named", "unnamed"),
    [
        ({}, [Q], ["model.layers.3.self_attn.k_proj", "model.layers.3.self_attn.xq_proj"]),
        ({"target_modules": "all-linear"}, [Q], ["lm_head"]),
        ({"target_modules": "ALL-LINEAR"}, [Q], ["lm_head"]),
        ({"target_modules": r".*\.q_proj"}, [Q, "lm_head"], []),
        ({"exclude_modules": ["layers.3.self_attn.q_proj"]}, [], [Q]),
        ({"layers_to_transform": 3}, [Q], ["model.layers.4.self_attn.q_proj"]),
        ({"layers_to_transform": [1, 3]}, [Q], ["model.layers.2.self_attn.q_proj"]),
        ({"layers_to_transform": []}, [Q], []),
        ({"layers_to_transform": [3], "layers_pattern": "layers"}, [Q], []),
        ({"layers_to_transform": [3], "layers_pattern": ["h", "layers"]}, [Q], []),
        ({"layers_to_transform": [3], "layers_pattern": ["h"]}, [], [Q]),
        ({"layers_to_transform": [3], "target_modules": [Q]}, [Q], []),
    ],
)
def test_targets_say_which_modules_are_adapted(
    changes: dict[str, Any], named: list[str], unnamed: list[str]
) -> None:
    config = parse(**changes)
    assert [name for name in named + unnamed if config.names(name)] == named


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"bias": ["none"]}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"use_something_new": True}, "use_something_new"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"init_lora_weights": {}}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"r": 129}, "rank 129"),
        ({"rank_pattern": {"q_proj": 256}}, "rank 256"),
        ({"alpha_pattern": {"(?!lm_head).*": 2}}, "alpha_pattern"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern"),
        ({"rank_pattern": {f"a{n}*": 2 for n in range(65)}}, "rank_pattern"),
        ({"layers_to_transform": 1, "layers_pattern": "(a+)+"}, "layers_pattern"),
    ],
)
def test_what_is_not_served_exactly_is_refused_by_name(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(UnsupportedModelError, match=field) as caught:
        parse(**changes)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("init", [None, True, False, "gaussian", "eva", "orthogonal"])
def test_a_start_that_keeps_the_base_is_taken(init: object) -> None:
    assert parse(init_lora_weights=init).rank == 8


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"r": -1},
        {"r": "8"},
        {"r": True},
        {"r": 8.5},
        {"r": 2**70},
        {"lora_alpha": math.nan},
        {"lora_alpha": math.inf},
        {"lora_alpha": 10**400},
        {"lora_alpha": 1e7},
        {"lora_alpha": None},
        {"use_rslora": "yes"},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": ["q_proj"]},
        {"alpha_pattern": {"q_proj": math.nan}},
        {"alpha_pattern": {"q_proj": "1"}},
        {"target_modules": None},
        {"target_modules": []},
        {"target_modules": ""},
        {"target_modules": [1]},
        {"target_modules": {"q_proj": 1}},
        {"target_modules": ["q" * 2000]},
        {"layers_to_transform": "1"},
        {"peft_type": None},
        {"base_model_name_or_path": 3},
    ],
)
def test_what_peft_does_not_write_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DeployError) as caught:
        parse(**changes)
    assert "\n" not in caught.value.message
    assert "adapter_config.json" in caught.value.message


_TEXT = st.text("aq_.0*(", max_size=5)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=4,
)
_FIELDS = st.sampled_from(
    [
        *GOOD,
        "alpha_pattern",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "rank_pattern",
    ]
)


def parsed(changes: dict[str, Any]) -> LoraConfig | str:
    """The configuration, or why it was refused."""
    try:
        return parse(**changes)
    except DeployError as error:
        return error.message


@given(st.dictionaries(_FIELDS, _JSON, max_size=3))
def test_any_object_is_read_or_refused_in_one_line(changes: dict[str, Any]) -> None:
    config = parsed(changes)
    if isinstance(config, str):
        assert "\n" not in config
        assert len(config) < 1000
        return
    assert 1 <= config.rank_of(Q) <= 128
    assert math.isfinite(config.scaling_of(Q))
    config.names(Q)


def read(directory: Path) -> LoraConfig:
    return read_config(DirectoryFiles(directory))


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps(GOOD))
    assert read(tmp_path) == parse()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not JSON"),
        ("[]", "no JSON object"),
        ('{"peft_type": "LORA", "lora_alpha": NaN}', "not JSON"),
        ("[" * 100_000, "not JSON"),
        (" " * (1 << 20) + json.dumps(GOOD), "at most 1048576"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, why: str) -> None:
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=why):
        read(tmp_path)


def test_a_directory_without_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read(tmp_path)


def test_a_model_is_told_from_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="flashserve deploy NAME SOURCE"):
        read(tmp_path)
