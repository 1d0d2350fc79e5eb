"""First-use work of a fresh process, done before a request waits for it."""

from __future__ import annotations

from typing import Any

import torch

from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.engine.engine import Engine
from flashserve.messages.work import GenerateJob
from flashserve.types import SamplingParams

_TINY_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def warm_up(device: torch.device) -> None:
    """Runs a tiny random model through every path of the engine; takes a second or two, once.

    Whole prompt, chunks, decodes alone and together, greedy and random draws, in float32 and
    bfloat16.
    """
    for dtype in (torch.float32, torch.bfloat16):
        model = loading.build_skeleton(_TINY_CONFIG, dtype, device=str(device))
        settings = EngineSettings(kv_bytes=1 << 20, max_batch_tokens=48)
        engine = Engine(model, settings)
        drawn = SamplingParams(temperature=1.0, top_p=0.9, seed=0, max_tokens=4, logprobs=1)
        for index, params in enumerate((SamplingParams(temperature=0.0, max_tokens=8), drawn)):
            prompt = tuple(range(1, 40 + index))
            engine.add(GenerateJob(str(index), prompt, params))
        while engine.has_work:
            engine.step()
