"""A mixture's experts, kept apart as checkpoints store them, so that binding copies nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn


class _Expert(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)


class Experts(nn.ModuleList):
    """Replaces the fused experts of transformers' Qwen3-MoE: same call, same result.

    min_rows: an expert computes at least so many rows, for the sake of batch_invariant.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(
            _Expert(fused.hidden_dim, fused.intermediate_dim) for _ in range(fused.num_experts)
        )
        self.act_fn = fused.act_fn
        self.min_rows = 1

    def forward(
        self, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts.

        Args:
            hidden: [tokens, hidden_size].
            chosen: [tokens, k] experts of each token.
            weights: [tokens, k] of those experts.
        """
        output = torch.zeros_like(hidden)
        if hidden.is_meta:
            return output
        for index in sorted(set(chosen.flatten().tolist())):
            tokens, places = torch.where(chosen == index)
            num_rows = len(tokens)
            rows = hidden[tokens]
            if num_rows < self.min_rows:
                rows = F.pad(rows, (0, 0, 0, self.min_rows - num_rows))
            expert = self[index]
            rows = expert.down_proj(self.act_fn(expert.gate_proj(rows)) * expert.up_proj(rows))
            output.index_add_(0, tokens, rows[:num_rows] * weights[tokens, places, None])
        return output


def unfuse(model: nn.Module) -> None:
    """Replaces every fused experts module of a model without weights."""
    for module in list(model.modules()):
        fused = getattr(module, "experts", None)
        if isinstance(fused, nn.Module) and hasattr(fused, "gate_up_proj"):
            with torch.device(fused.gate_up_proj.device):
                module.experts = Experts(fused).to(fused.gate_up_proj.dtype)
