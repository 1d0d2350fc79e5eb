import dataclasses

import pytest
import torch
import transformers

from flashserve.engine import loading
from flashserve.engine.selfcheck import CheckKey, SelfCheck, check_ids, check_logits
from flashserve.errors import SelfCheckError

torch.set_num_threads(1)

KEY = CheckKey("identity", "a device", "torch.bfloat16", "torch 1")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}


def test_the_first_logits_are_kept_and_later_ones_compared(tmp_path):
    check, logits = SelfCheck(tmp_path / "new", KEY), torch.randn(100)
    assert not check.compare(logits)
    assert SelfCheck(tmp_path / "new", KEY).compare(logits + 0.001)
    assert torch.equal(check.reference(), logits)
    assert [path.suffix for path in (tmp_path / "new").iterdir()] == [".safetensors"]


@pytest.mark.parametrize("field", ["identity", "device", "dtype", "versions"])
def test_each_part_of_the_key_has_a_reference_of_its_own(tmp_path, field):
    SelfCheck(tmp_path, KEY).record(torch.ones(4))
    other = dataclasses.replace(KEY, **{field: "torch.float16"})
    assert SelfCheck(tmp_path, other).reference() is None


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.float16", "torch.bfloat16"])
def test_the_tolerance_is_that_of_the_dtype(tmp_path, dtype):
    allowed = {"torch.float32": 1e-4, "torch.float16": 4e-3, "torch.bfloat16": 3e-2}[dtype]
    check = SelfCheck(tmp_path, dataclasses.replace(KEY, dtype=dtype))
    logits = torch.linspace(-8, 4, 50)
    check.record(logits)
    assert check.compare(logits + 7.9 * allowed)
    with pytest.raises(SelfCheckError, match="differ by"):
        check.compare(logits + 8.1 * allowed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_never_passes_and_is_never_kept(tmp_path, value):
    check, damaged = SelfCheck(tmp_path, KEY), torch.tensor([1.0, value])
    with pytest.raises(SelfCheckError, match="not finite"):
        check.compare(damaged)
    assert check.reference() is None
    check.record(torch.ones(2))
    with pytest.raises(SelfCheckError, match="differ"):
        check.compare(damaged)


def test_another_number_of_logits_is_refused(tmp_path):
    check = SelfCheck(tmp_path, KEY)
    check.record(torch.ones(2))
    with pytest.raises(SelfCheckError, match=r"\[3\] logits"):
        check.compare(torch.ones(3))


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, (1 << 40).to_bytes(8, "little")])
def test_a_damaged_reference_is_made_anew(tmp_path, content, caplog):
    check = SelfCheck(tmp_path, KEY)
    check.path.write_bytes(content)
    assert not check.compare(torch.ones(3))
    assert "made anew" in caplog.text
    assert check.compare(torch.ones(3))


def test_the_key_names_device_dtype_and_libraries():
    key = CheckKey.of("c0ffee", torch.device("cpu"), torch.float16)
    assert str(torch.__version__) in key.versions
    assert transformers.__version__ in key.versions
    assert (key.identity, key.dtype) == ("c0ffee", "torch.float16")
    assert key.device.startswith("cpu")


def test_the_prompt_is_fixed_and_within_the_vocabulary():
    assert torch.equal(check_ids(64), check_ids(64))
    assert 0 <= int(check_ids(7).min()) <= int(check_ids(7).max()) < 7


def test_logits_are_those_of_the_model_and_show_a_changed_weight():
    torch.manual_seed(0)
    model = loading.build_skeleton(CONFIG, torch.float32, device="cpu")
    device = torch.device("cpu")
    logits = check_logits(model, device)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = plain(check_ids(64)[None]).logits[0, -1]
        torch.testing.assert_close(logits, expected)
        assert torch.equal(check_logits(model, device), logits)
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    assert not torch.allclose(check_logits(model, device), logits, atol=1e-4)
