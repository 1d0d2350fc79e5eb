from __future__ import annotations

import pytest
import torch
from tests.integration.engine.families import FAMILIES, served
from tests.integration.engine.support import prompt_of
from torch import nn

from flashserve.engine.attention import AttentionStep, Span
from flashserve.engine.forward import FusedForward, ModuleForward
from flashserve.engine.runner import KVShape

FUSED = {family for family in FAMILIES if family.startswith(("llama", "mistral", "qwen"))} - {
    "llama-bias",
    "qwen3-moe",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_leaner_path_takes_only_what_it_knows(family: str) -> None:
    assert FusedForward.suits(served(family)) == (family in FUSED)


def test_a_replaced_linear_layer_is_not_bypassed() -> None:
    class Adapted(nn.Linear):
        pass

    model = served("llama")
    attention = model.model.layers[0].self_attn
    plain = attention.q_proj
    attention.q_proj = Adapted(plain.in_features, plain.out_features, bias=False)
    try:
        assert not FusedForward.suits(model)
    finally:
        attention.q_proj = plain


@pytest.mark.parametrize("family", sorted(FUSED))
def test_both_paths_compute_the_same(family: str) -> None:
    model = served(family)
    shape = KVShape.of(model.config, torch.float32)
    prompt = torch.tensor(prompt_of(40))
    positions = torch.arange(40)
    rows = torch.tensor([0, 17, 39])
    logits = []
    with torch.inference_mode():
        for forward in (FusedForward(model), ModuleForward(model)):
            pool = shape.view(torch.zeros(40 * shape.bytes_per_token, dtype=torch.uint8), 40)
            step = AttentionStep(pool, [Span(pool, 0, 0, 40, slice(0, 40))], slice(0, 40))
            logits.append(forward(prompt, positions, rows, step))
    torch.testing.assert_close(*logits, atol=2e-4, rtol=1e-4)
