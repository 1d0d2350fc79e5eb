"""What is read of an adapter is what PEFT computes with when it loads the same directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import LlamaConfig, LlamaForCausalLM

from flashserve.config import StoreSettings
from flashserve.errors import UnsupportedModelError
from flashserve.store.adapters.layout import AdapterLayer, AdapterSnapshot
from flashserve.store.store import Store
from flashserve.types import AdapterSpec, ModelId, ModelSpec

MIB = 1 << 20
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT says when it saves embeddings


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_model(tied: bool = False) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    path = tmp_path_factory.mktemp("base")
    make_model(request.param).save_pretrained(path)
    return ModelSpec(ModelId("base"), str(path), 1)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(
        tmp_path / "data",
        4 * MIB,
        False,
        StoreSettings(scrub_bytes_per_s=0),
        adapter_bytes=2 * MIB,
    )
    yield store
    store.close()


def train(
    base: ModelSpec, directory: Path, dtype: torch.dtype = torch.float32, **config: Any
) -> None:
    """Saves an adapter whose weights are all random, as after a training."""
    model = LlamaForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    tuned = get_peft_model(model, LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                parameter.normal_()
                parameter.data = parameter.data.to(dtype)
    tuned.save_pretrained(directory)


def peft_layers(base: ModelSpec, directory: Path) -> dict[str, LoraLayer]:
    """By the module's name in the base, as PEFT has them after loading."""
    model = LlamaForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(model, directory, autocast_adapter_dtype=False)
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module
        for name, module in tuned.named_modules()
        if isinstance(module, LoraLayer)
    }


def weights(layer: LoraLayer, is_embedding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if is_embedding:
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight


def values(store: Store, slice_: Any) -> np.ndarray:
    with store.arena._view[slice_.offset : slice_.offset + slice_.num_bytes] as data:
        if slice_.dtype == "BF16":
            bits = np.frombuffer(bytes(data), np.uint16).astype(np.uint32) << 16
            return bits.view(np.float32).reshape(slice_.shape)
        kind = {"F32": np.float32, "F16": np.float16}[slice_.dtype]
        return np.frombuffer(bytes(data), kind).astype(np.float32).reshape(slice_.shape)


def compare(store: Store, base: ModelSpec, directory: Path) -> AdapterSnapshot:
    adapter = store.adapters.admit(str(directory), base)
    expected = peft_layers(base, directory)
    found: dict[str, AdapterLayer] = {layer.module: layer for layer in adapter.layers}
    assert sorted(found) == sorted(expected)
    spec = AdapterSpec("a", 1, base.model_id, str(directory), 1, adapter.identity)
    with store.adapters.hold(spec) as lease:
        for layer in lease.layers:
            theirs = expected[layer.module]
            assert layer.scaling == theirs.scaling["default"]
            a, b = weights(theirs, found[layer.module].is_embedding)
            np.testing.assert_array_equal(values(store, layer.a), a.float().detach().numpy())
            np.testing.assert_array_equal(values(store, layer.b), b.float().detach().numpy())
    return adapter


@pytest.mark.parametrize(
    "config",
    [
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]},
        {"r": 8, "lora_alpha": 3, "target_modules": ALL, "use_rslora": True},
        {"r": 4, "target_modules": "all-linear"},
        {"r": 4, "target_modules": r".*\.layers\.\d+\.(self_attn\.[qk]|mlp\.up)_proj"},
        {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [0, 2]},
        {
            "r": 4,
            "target_modules": ["q_proj"],
            "layers_to_transform": 1,
            "layers_pattern": "layers",
        },
        {"r": 4, "target_modules": ALL, "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ALL,
            "rank_pattern": {r"layers\.[01]\..*_proj": 2, "q_proj": 4, "model.layers.2.mlp": 6},
            "alpha_pattern": {"^model.layers.2.*": 5, "up_proj|down_proj": 7, "k_proj": 9},
        },
        {
            "r": 8,
            "target_modules": ALL,
            "use_rslora": True,
            "rank_pattern": {"k_proj": 3},
            "alpha_pattern": {"k_proj": 10},
        },
        {"r": 4, "target_modules": ["embed_tokens", "q_proj"]},
        {"r": 4, "target_modules": ["lm_head", "q_proj"]},
        {"r": 4, "target_modules": ["embed_tokens", "lm_head"]},
        {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    ],
)
def test_layers_are_those_of_peft(
    store: Store, base: ModelSpec, tmp_path: Path, config: dict[str, Any]
) -> None:
    train(base, tmp_path / "a", **config)
    compare(store, base, tmp_path / "a")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_types_are_taken(
    store: Store, base: ModelSpec, tmp_path: Path, dtype: torch.dtype
) -> None:
    train(base, tmp_path / "a", dtype, r=4, target_modules=ALL)
    compare(store, base, tmp_path / "a")


def test_targets_and_numbers_are_told(store: Store, base: ModelSpec, tmp_path: Path) -> None:
    train(base, tmp_path / "a", r=4, target_modules=["v_proj", "up_proj"], rank_pattern={"v": 2})
    adapter = compare(store, base, tmp_path / "a")
    assert adapter.targets == ("up_proj", "v_proj")
    assert adapter.rank == 4
    assert adapter.num_parameters == 3 * 4 * ((16 + 24) + (16 + 8))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"init_lora_weights": "pissa_niter_2"}, "init_lora_weights"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"r": 256}, "rank 256"),
    ],
)
def test_what_is_not_served_exactly_is_refused(
    store: Store, base: ModelSpec, tmp_path: Path, config: dict[str, Any], field: str
) -> None:
    train(base, tmp_path / "a", **{"r": 4, "target_modules": ["q_proj"], **config})
    with pytest.raises(UnsupportedModelError, match=field):
        store.adapters.admit(str(tmp_path / "a"), base)


def test_an_embedding_that_was_changed_itself_is_refused(
    store: Store, base: ModelSpec, tmp_path: Path
) -> None:
    changed = LlamaForCausalLM.from_pretrained(base.source, dtype=torch.float32)
    with torch.no_grad():
        changed.get_input_embeddings().weight[3, 2] += 1
    tuned = get_peft_model(changed, LoraConfig(r=4, target_modules=["embed_tokens"]))
    tuned.save_pretrained(tmp_path / "a")
    with pytest.raises(UnsupportedModelError, match="that are not its base's"):
        store.adapters.admit(str(tmp_path / "a"), base)
