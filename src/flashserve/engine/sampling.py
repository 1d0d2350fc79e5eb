"""Draws the next tokens from logits.

A draw depends on the logits of its row, the sequence's seed and the position in the completion,
and on nothing else: not on the batch, not on how often the engine was asked before.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence as Rows

import torch

from flashserve.types import SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Draw:
    """What one row of logits is asked for; position counts the completion's tokens from 0."""

    params: SamplingParams
    seed: int
    position: int


@dataclasses.dataclass(frozen=True, slots=True)
class Drawn:
    """A token with its log-probability under the model, before temperature and truncation.

    is_valid: the row held numbers; otherwise the token means nothing.
    """

    token_id: int
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    is_valid: bool


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) made from nothing but the seed and the position."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def sample(logits: torch.Tensor, draws: Rows[Draw]) -> list[Drawn]:
    """One token for each row.

    Args:
        logits: [rows, vocabulary], any float dtype.
        draws: one for each row.
    """
    # A row with a NaN has it as its maximum, one that overflowed an infinity. Several times faster
    # in bfloat16 than argmax, and the same: of equal ones the first.
    highest, best = logits.max(dim=-1)
    valid = highest.isfinite().tolist()
    tokens = best.tolist()
    drawn = []
    for row, draw in enumerate(draws):
        token = tokens[row]
        if valid[row] and draw.params.temperature > 0:
            token = _draw_token(logits[row].float(), draw)
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if valid[row] and draw.params.logprobs is not None:
            logprob, top = _logprobs(logits[row].float(), token, draw.params.logprobs)
        drawn.append(Drawn(token, logprob, top, valid[row]))
    return drawn


def _draw_token(logits: torch.Tensor, draw: Draw) -> int:
    """Temperature, then top_k, then top_p, then one draw by inversion. logits: [vocabulary]."""
    params = draw.params
    scaled = (logits - logits.max()).double() / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled, tokens = scaled.topk(params.top_k)
    elif params.top_p < 1:
        scaled, tokens = scaled.sort(descending=True, stable=True)
    else:
        tokens = None
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1)
    if params.top_p < 1:
        # The smallest set of most likely tokens whose mass reaches top_p, never empty.
        num_kept = int((cumulative < params.top_p).sum()) + 1
        cumulative = cumulative[:num_kept]
    target = uniform(draw.seed, draw.position) * float(cumulative[-1])
    index = min(int((cumulative <= target).sum()), len(cumulative) - 1)
    return index if tokens is None else int(tokens[index])


def _logprobs(
    logits: torch.Tensor, token: int, num_top: int
) -> tuple[float, tuple[tuple[int, float], ...]]:
    logprobs = logits.log_softmax(dim=-1)
    values, ids = logprobs.topk(min(num_top, len(logprobs)))
    return float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True))
