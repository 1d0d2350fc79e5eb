"""Engines over tiny models, and how to run them."""

from __future__ import annotations

import random

import torch
from tests.integration.engine.families import VOCABULARY, served

from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.engine.runner import KVShape
from flashserve.messages.work import GenerateJob
from flashserve.types import SamplingParams, TokenOutput


def make_engine(
    family: str, pool_tokens: int, dtype: torch.dtype = torch.float32, **settings: object
) -> Engine:
    model = served(family, dtype)
    shape = KVShape.of(model.config, dtype)
    pool = torch.zeros(pool_tokens * shape.bytes_per_token, dtype=torch.uint8)
    return Engine(model, EngineSettings(block_tokens=8, **settings), pool)


def job(name: str, prompt: list[int], num_tokens: int, **changes: object) -> GenerateJob:
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, logprobs=0)
    return GenerateJob(name, tuple(prompt), params, **changes)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, VOCABULARY) for _ in range(length)]


def run_outputs(engine: Engine) -> dict[str, list[TokenOutput]]:
    """Steps until all is done; what each sequence emitted."""
    outputs: dict[str, list[TokenOutput]] = {}
    while engine.has_work:
        for name, output in engine.step():
            outputs.setdefault(name, []).append(output)
    usage = engine.kv_usage()
    assert usage.used == 0
    assert usage.cached + usage.free == usage.total
    return outputs


def run(engine: Engine) -> dict[str, list[int]]:
    """Steps until all is done; the tokens of each sequence."""
    found = run_outputs(engine)
    return {name: [output.token_id for output in outputs] for name, outputs in found.items()}
