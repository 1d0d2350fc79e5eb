from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from flashserve.engine.sampling import Draw, sample, uniform
from flashserve.types import SamplingParams

PROBABILITIES = [0.5, 0.25, 0.15, 0.06, 0.04]
LOGITS = torch.tensor(PROBABILITIES).log()


def draw_many(num_draws: int = 4000, **params: object) -> Counter[int]:
    """Tokens drawn from LOGITS at positions 0, 1, ... of one seed."""
    chosen = SamplingParams(**{"temperature": 1.0, **params})
    draws = [Draw(chosen, 1234, position) for position in range(num_draws)]
    drawn = sample(LOGITS.expand(num_draws, -1), draws)
    return Counter(item.token_id for item in drawn)


def test_greedy_takes_the_most_likely() -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    greedy = Draw(SamplingParams(temperature=0.0), 0, 0)
    assert [item.token_id for item in sample(logits, [greedy, greedy])] == [1, 0]


def test_frequencies_follow_the_probabilities() -> None:
    counts = draw_many()
    for token, probability in enumerate(PROBABILITIES):
        assert counts[token] / 4000 == pytest.approx(probability, abs=0.03)


def test_temperature_sharpens_and_flattens() -> None:
    sharp, flat = draw_many(temperature=0.5), draw_many(temperature=2.0)
    squares = [p**2 for p in PROBABILITIES]
    roots = [math.sqrt(p) for p in PROBABILITIES]
    for token in range(5):
        assert sharp[token] / 4000 == pytest.approx(squares[token] / sum(squares), abs=0.03)
        assert flat[token] / 4000 == pytest.approx(roots[token] / sum(roots), abs=0.03)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 1}, {0}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.4}, {0}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_p": 0.89}, {0, 1, 2}),
        ({"top_p": 1e-9}, {0}),
        ({"top_p": 0.6, "top_k": 1}, {0}),
        ({"top_k": 3, "top_p": 0.8}, {0, 1}),  # of the three kept, 0.5 + 0.25 is 83 %
        ({"temperature": 1e-300}, {0}),
    ],
)
def test_truncation_keeps_just_the_most_likely(params: dict[str, object], kept: set[int]) -> None:
    assert set(draw_many(1500, **params)) == kept


def test_a_draw_is_the_same_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 500, generator=generator)
    params = SamplingParams(temperature=1.3, top_p=0.9)
    draws = [Draw(params, seed, position) for seed in (1, 2, 3) for position in range(4)]
    together = [item.token_id for item in sample(logits, draws)]
    alone = [sample(logits[row : row + 1], [draw])[0].token_id for row, draw in enumerate(draws)]
    backwards = [item.token_id for item in sample(logits.flip(0), draws[::-1])][::-1]
    assert together == alone == backwards


def test_seeds_and_positions_are_independent() -> None:
    values = [uniform(seed, position) for seed in range(60) for position in range(60)]
    assert len(set(values)) == 3600
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / 3600 == pytest.approx(0.5, abs=0.02)
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


def test_logprobs_are_before_temperature_and_list_the_best() -> None:
    params = SamplingParams(temperature=0.1, top_k=1, logprobs=3)
    (drawn,) = sample(LOGITS[None], [Draw(params, 0, 0)])
    assert drawn.logprob == pytest.approx(math.log(0.5), abs=1e-5)
    assert [token for token, _ in drawn.top_logprobs] == [0, 1, 2]
    (bare,) = sample(LOGITS[None], [Draw(SamplingParams(logprobs=0), 0, 0)])
    assert bare.logprob is not None
    assert bare.top_logprobs == ()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_without_numbers_is_marked_and_spares_the_others(bad: float) -> None:
    logits = torch.stack([LOGITS, LOGITS]).clone()
    logits[0, 3] = bad
    drawn = sample(logits, [Draw(SamplingParams(logprobs=2), 0, 0)] * 2)
    assert [item.is_valid for item in drawn] == [False, True]
