from __future__ import annotations

import functools

import pytest
import torch

from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.engine.engine import Engine
from flashserve.engine.runner import KVShape
from flashserve.errors import ConflictError, ContextLengthError, InputError, UnavailableError
from flashserve.messages.work import GenerateJob
from flashserve.types import KVUsage, SamplingParams

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}


@functools.cache
def model() -> torch.nn.Module:
    return loading.build_skeleton(CONFIG, torch.float32, device="cpu")


def make_engine(num_blocks: int = 16) -> Engine:
    shape = KVShape.of(model().config, torch.float32)
    pool = torch.zeros(num_blocks * 4 * shape.bytes_per_token + 3, dtype=torch.uint8)
    return Engine(model(), EngineSettings(block_tokens=4), pool)


def make_job(prompt_ids: tuple[int, ...] = (1, 2, 3), **params: object) -> GenerateJob:
    return GenerateJob("x", prompt_ids, SamplingParams(**{"temperature": 0.0, **params}))


@pytest.mark.parametrize(
    ("job", "error", "named"),
    [
        (make_job(()), InputError, "prompt is empty"),
        (make_job((1, 50)), InputError, "token id 50"),
        (make_job((1, -1)), InputError, "token id -1"),
        (make_job(max_tokens=0), InputError, "max_tokens"),
        (make_job(temperature=-1.0), InputError, "temperature"),
        (make_job(temperature=float("nan")), InputError, "temperature"),
        (make_job(temperature=float("inf")), InputError, "temperature"),
        (make_job(top_p=0.0), InputError, "top_p"),
        (make_job(top_p=1.5), InputError, "top_p"),
        (make_job(top_p=float("nan")), InputError, "top_p"),
        (make_job(top_k=-1), InputError, "top_k"),
        (make_job(logprobs=-1), InputError, "logprobs"),
        (make_job((1,) * 100, max_tokens=29), ContextLengthError, "context of 128"),
        (make_job((1,) * 60, max_tokens=6), ContextLengthError, "KV pool of 64"),
        (
            GenerateJob("x", (1,), SamplingParams(max_tokens=2), emitted_ids=(1, 2)),
            InputError,
            "max_tokens is 2",
        ),
        (
            GenerateJob("x", (1,), SamplingParams(max_tokens=2), emitted_ids=(99,)),
            InputError,
            "token id 99",
        ),
    ],
)
def test_a_job_that_cannot_be_served_is_refused(
    job: GenerateJob, error: type[Exception], named: str
) -> None:
    engine = make_engine()
    with pytest.raises(error, match=named):
        engine.add(job)
    assert not engine.has_work
    assert engine.kv_usage() == KVUsage(total=16, used=0, cached=0, free=16)


def test_a_job_that_just_fits_is_served() -> None:
    engine = make_engine()
    engine.add(make_job((1,) * 60, max_tokens=5))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [output.index for _, output in outputs] == [0, 1, 2, 3, 4]
    assert outputs[-1][1].finish_reason == "length"


def test_a_running_id_is_not_taken_twice() -> None:
    engine = make_engine()
    engine.add(make_job())
    with pytest.raises(ConflictError, match="x"):
        engine.add(make_job())
    engine.abort("x")
    engine.add(make_job())


def test_a_step_without_work_does_nothing() -> None:
    assert make_engine().step() == []


def test_a_pool_without_a_block_is_refused() -> None:
    with pytest.raises(UnavailableError, match=r"engine\.kv_bytes"):
        Engine(model(), EngineSettings(block_tokens=4), torch.zeros(10, dtype=torch.uint8))


def test_a_sequence_whose_logits_are_no_numbers_ends_with_an_error() -> None:
    broken = loading.build_skeleton(CONFIG, torch.float32, device="cpu")
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")  # type: ignore[union-attr, index]
    engine = Engine(broken, EngineSettings(kv_bytes=1 << 16, block_tokens=4))
    engine.add(GenerateJob("bad", (1, 7), SamplingParams(temperature=0.0)))
    engine.add(GenerateJob("good", (1, 2), SamplingParams(temperature=0.0)))
    reasons = {name: output.finish_reason for name, output in engine.step()}
    assert reasons == {"bad": "error", "good": None}
    assert engine.num_running == 1
