"""The meta-device model bound to a mapping, against transformers' own from_pretrained."""

import ctypes
import json
import mmap
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.device.bind import bind, match, unbind
from flashserve.store.dram.arena import attach
from flashserve.types import TensorSlice

torch.set_num_threads(1)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama tied": lambda: transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3 rope": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "qwen3 moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=16),
    "gemma": lambda: transformers.GemmaConfig(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES),
}


class Mapped:
    """A checkpoint directory in a memfd that is mapped read-only, as a worker has it."""

    def __init__(self, directory: Path, start: int = 0) -> None:
        layout = read_layout(directory)
        offsets = [start + offset for offset in layout.file_offsets]
        self.fd = os.memfd_create("test")
        os.ftruncate(self.fd, start + layout.image_bytes)
        for file, offset in zip(layout.files, offsets, strict=True):
            os.pwrite(self.fd, (directory / file.name).read_bytes(), offset)
        self.num_bytes = start + layout.image_bytes
        self.mapping = attach(self.fd, self.num_bytes)
        self.address = np.frombuffer(self.mapping, np.uint8).ctypes.data
        self.tensors = tuple(
            TensorSlice(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                offsets[tensor.file_index] + tensor.begin,
                tensor.end - tensor.begin,
            )
            for tensor in layout.tensors
        )
        os.close(self.fd)

    def holds(self, tensor: torch.Tensor) -> bool:
        return self.address <= tensor.data_ptr() < self.address + self.num_bytes


def save(config: transformers.PreTrainedConfig, directory: Path, dtype=torch.float32) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(directory)
    return directory


def skeleton(directory: Path) -> torch.nn.Module:
    config = transformers.AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.eval()


def reference(directory: Path, **options) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **options).eval()


def everything(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bound_model_equals_from_pretrained(tmp_path, name, dtype):
    save(CONFIGS[name](), tmp_path, dtype)
    expected = reference(tmp_path)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, None)
    found = dict(everything(model))
    assert found.keys() == dict(everything(expected)).keys()
    for key, value in everything(expected):
        assert not found[key].is_meta
        assert found[key].requires_grad == value.requires_grad
        torch.testing.assert_close(found[key], value.to(found[key].dtype), rtol=0, atol=0, msg=key)
    ids = torch.arange(20).reshape(1, 20)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unbound_model_holds_nothing_and_can_be_bound_elsewhere(tmp_path, name, dtype):
    save(CONFIGS[name](), tmp_path)
    expected = reference(tmp_path, dtype=dtype)
    ids = torch.arange(20).reshape(1, 20)
    model = skeleton(tmp_path)
    for start in (0, 4096):
        mapped = Mapped(tmp_path, start)
        bind(model, mapped.tensors, mapped.mapping, dtype)
        found = dict(everything(model))
        for key, value in expected.named_parameters(remove_duplicate=False):
            assert torch.equal(found[key], value), key
            assert found[key].requires_grad == value.requires_grad
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected(ids).logits)
        unbind(model)
        del found
        assert all(value.is_meta for value in model.parameters())
        assert not any(mapped.holds(value) for _, value in everything(model) if not value.is_meta)
        mapped.mapping.close()  # would raise while a view is left


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_the_bytes_of_the_mapping(tmp_path, tied):
    save(transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied), tmp_path)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, torch.float32)
    offsets = {tensor.name: tensor.offset for tensor in mapped.tensors}
    for name, value in model.named_parameters():
        assert value.data_ptr() == mapped.address + offsets[name]
        assert value.untyped_storage().nbytes() == value.nbytes
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_binding_warns_of_nothing_and_keeps_the_mapping_open(tmp_path):
    save(CONFIGS["llama"](), tmp_path)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bind(model, mapped.tensors, mapped.mapping, None)
    with pytest.raises(BufferError):
        mapped.mapping.close()
    del model
    mapped.mapping.close()


def test_an_arena_given_as_a_view_is_as_good(tmp_path):
    save(CONFIGS["llama"](), tmp_path)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, memoryview(mapped.mapping), None)
    assert all(mapped.holds(value) for value in model.parameters())


@pytest.mark.parametrize("start", [1, 2])
def test_a_misaligned_tensor_is_copied(tmp_path, start):
    save(CONFIGS["llama"](), tmp_path)
    mapped = Mapped(tmp_path, start)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, None)
    for (name, value), (_, wanted) in zip(
        everything(model), everything(reference(tmp_path)), strict=True
    ):
        assert not mapped.holds(value), name
        assert torch.equal(value, wanted)


def test_tensors_of_another_type_are_converted(tmp_path):
    save(CONFIGS["llama tied"](), tmp_path, torch.bfloat16)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, torch.float32)
    expected = dict(reference(tmp_path, dtype=torch.float32).named_parameters())
    for name, value in model.named_parameters():
        assert value.dtype is torch.float32
        assert not mapped.holds(value)
        assert torch.equal(value, expected[name])


def test_requires_grad_stays_as_it_was(tmp_path):
    save(CONFIGS["llama"](), tmp_path)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    model.lm_head.requires_grad_(False)
    bind(model, mapped.tensors, mapped.mapping, None)
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad


def only(name: str, dtype: str, shape: tuple[int, ...], num_bytes: int) -> tuple[TensorSlice, ...]:
    return (TensorSlice(name, dtype, shape, 0, num_bytes),)


class OneWeight(torch.nn.Module):
    """The least that bind takes: tie_weights and one parameter."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(shape, device="meta"))

    def tie_weights(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("BOOL", torch.bool),
        ("U8", torch.uint8),
        ("I8", torch.int8),
        ("F8_E4M3", torch.float8_e4m3fn),
        ("F8_E5M2", torch.float8_e5m2),
        ("I16", torch.int16),
        ("F16", torch.float16),
        ("BF16", torch.bfloat16),
        ("I32", torch.int32),
        ("F32", torch.float32),
        ("I64", torch.int64),
        ("F64", torch.float64),
    ],
)
def test_every_type_is_viewed_as_it_is(dtype, expected):
    data = (np.arange(4 * expected.itemsize) % 2).astype(np.uint8)
    model = OneWeight(2, 2)
    bind(model, only("weight", dtype, (2, 2), data.nbytes), memoryview(data), None)
    assert model.weight.dtype is expected
    assert model.weight.data_ptr() == data.ctypes.data
    assert ctypes.string_at(model.weight.data_ptr(), data.nbytes) == data.tobytes()


def test_an_empty_tensor_is_no_problem():
    model = OneWeight(0, 4)
    bind(model, only("weight", "F32", (0, 4), 0), memoryview(bytes(8)), None)
    assert model.weight.shape == (0, 4)


def test_an_unknown_type_is_refused():
    with pytest.raises(UnsupportedModelError, match="tensor weight has type F4"):
        match(OneWeight(4), only("weight", "F4", (4,), 2))


@pytest.mark.parametrize(("offset", "num_bytes"), [(-4, 16), (8, 16), (0, 12)])
def test_a_slice_outside_the_arena_is_refused(offset, num_bytes):
    slices = (TensorSlice("weight", "F32", (4,), offset, num_bytes),)
    with pytest.raises(CheckpointError, match="tensor weight"):
        bind(OneWeight(4), slices, memoryview(bytes(16)), None)


def llama_slices(tmp_path: Path, name: str) -> tuple[torch.nn.Module, dict[str, TensorSlice]]:
    save(CONFIGS[name](), tmp_path)
    return skeleton(tmp_path), {tensor.name: tensor for tensor in Mapped(tmp_path).tensors}


def test_a_missing_tensor_is_named(tmp_path):
    model, slices = llama_slices(tmp_path, "llama")
    del slices["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor model\.layers\.1\.mlp\.up_proj"):
        match(model, slices.values())


def test_an_unexpected_tensor_is_named(tmp_path):
    model, slices = llama_slices(tmp_path, "llama")
    extra = TensorSlice("model.layers.2.extra", "F32", (1,), 0, 4)
    with pytest.raises(CheckpointError, match=r"holds tensor model\.layers\.2\.extra"):
        match(model, [*slices.values(), extra])


def test_the_frequencies_of_old_checkpoints_are_ignored(tmp_path):
    model, slices = llama_slices(tmp_path, "llama")
    old = TensorSlice("model.layers.0.self_attn.rotary_emb.inv_freq", "F32", (4,), 0, 16)
    assert match(model, [*slices.values(), old]) == match(model, slices.values())


def test_a_tensor_of_another_shape_is_named(tmp_path):
    model, slices = llama_slices(tmp_path, "llama")
    slices["lm_head.weight"] = TensorSlice("lm_head.weight", "F32", (64, 31), 0, 64 * 31 * 4)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight has shape \[64, 31\].*\[64, 32\]"):
        match(model, slices.values())


def test_an_untied_model_needs_its_head(tmp_path):
    model, slices = llama_slices(tmp_path, "llama")
    del slices["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"lacks tensor lm_head\.weight"):
        match(model, slices.values())


def test_a_missing_or_odd_expert_is_named(tmp_path):
    model, slices = llama_slices(tmp_path, "qwen3 moe")
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    tensor = slices.pop(name)
    with pytest.raises(CheckpointError, match=r"lacks tensor .*experts\.2\.up_proj"):
        match(model, slices.values())
    slices[name] = TensorSlice(name, "F32", (32, 16), tensor.offset, tensor.num_bytes)
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight has shape \[32, 16\]"):
        match(model, slices.values())
    slices[name] = TensorSlice(name, "F16", tensor.shape, tensor.offset, tensor.num_bytes // 2)
    with pytest.raises(CheckpointError, match="different types"):
        match(model, slices.values())


def with_both_embeddings(tmp_path: Path, *, equal: bool) -> Path:
    """A checkpoint that holds lm_head and embeddings, of a config that ties them."""
    save(CONFIGS["llama"](), tmp_path)
    if equal:
        model = reference(tmp_path)
        model.lm_head.weight.data.copy_(model.model.embed_tokens.weight)
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    return tmp_path


@pytest.mark.parametrize("equal", [True, False])
def test_tied_weights_that_are_both_there_are_tied_if_equal(tmp_path, equal):
    with_both_embeddings(tmp_path, equal=equal)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, None)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == equal
    ids = torch.arange(5).reshape(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, reference(tmp_path)(ids).logits)


def test_a_tied_model_may_hold_its_head_instead_of_its_embeddings(tmp_path):
    with_both_embeddings(tmp_path, equal=True)
    mapped = Mapped(tmp_path)
    model = skeleton(tmp_path)
    kept = tuple(each for each in mapped.tensors if each.name != "model.embed_tokens.weight")
    bind(model, kept, mapped.mapping, None)
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert mapped.holds(model.lm_head.weight)


def test_a_buffer_that_nobody_knows_is_refused():
    model = OneWeight(1)
    model.register_buffer("mystery", torch.empty(1, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match="mystery"):
        bind(model, only("weight", "F32", (1,), 4), memoryview(bytes(4)), None)


def test_a_bound_model_reads_what_the_mapping_holds():
    """No copy stands between: a change of the bytes is a change of the weight."""
    with mmap.mmap(-1, 4096) as arena:
        model = OneWeight(1)
        bind(model, only("weight", "F32", (1,), 4), arena, None)
        arena[:4] = np.float32(2.5).tobytes()
        assert model.weight.item() == 2.5
        del model
