"""How fast many fine-tunes of one base answer together, beside the base alone and beside PEFT.

One process, one thread, the real small model in bfloat16, 16 concurrent greedy requests of random
tokens, end of text ignored; random adapters on all linear layers of the decoder. The clock covers
everything from ids to ids, prompts included; adapters are resident, except in the miss measure.
Nothing else is cached: prefix reuse is off. One call of each row comes first, uncounted; then the
rows take turns, and a fraction is the median over the rounds of row / base.

  base               FlashServe without adapters
  N of rank R        FlashServe, the 16 requests spread over N adapters of rank R
  PEFT mixed         PEFT's `adapter_names`, 8 adapters of rank 8, in one batch
  merged, swapping   one adapter merged at a time: unmerge, merge, its requests, the next one
  transformers       `generate` without adapters

A miss is a request for a known adapter that is not resident, in an engine with room for few: its
time to first token over that of the same request once the adapter is there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import nn

import common
import engine as base_bench
from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.engine.runner import allocate_pool
from flashserve.messages.work import AdapterImage, GenerateJob, LoraLayer
from flashserve.types import AdapterId, SamplingParams, TensorSlice

SEED = 0
CONCURRENT = 16
AIMS = {"vs_peft_mixed_8": 2.0}
FRACTIONS = {1: 0.95, 8: 0.88, 16: 0.80}
MISS_AIM_MS = 30.0
_POOL_BYTES = 192 << 20


@dataclasses.dataclass
class Bench:
    """The models and the workload; each row returns new tokens per second."""

    ours: nn.Module
    theirs: Any
    peft: Any
    num_tokens: int
    prompts: list[list[int]]
    tensors: dict[str, torch.Tensor]

    def image(self, number: int, rank: int) -> AdapterImage:
        """A random adapter; those of one rank share their bytes in the arena, not in memory."""
        layers = []
        for name, module in self.ours.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                shapes = {"a": (rank, module.in_features), "b": (module.out_features, rank)}
                slices = []
                for leaf, shape in shapes.items():
                    key = f"{rank} {name} {leaf}"
                    if key not in self.tensors:
                        self.tensors[key] = (torch.randn(shape) * 0.01).bfloat16()
                    slices.append(TensorSlice(key, "BF16", shape, 0, 0))
                layers.append(LoraLayer(name, 2.0, *slices))
        return AdapterImage(AdapterId(f"{rank}-{number}@1"), tuple(layers))

    def make_engine(self, num_adapters: int, rank: int, *, room: int | None = None) -> Engine:
        """Args: room: adapters that fit the memory; all if not given."""
        one = adapter_bytes(self.ours, rank)
        settings = EngineSettings(
            reuse_prefixes=False,
            adapter_bytes=max(1, int(one * 1.05 * (room or num_adapters))) + (1 << 20),
        )
        pool = allocate_pool(_POOL_BYTES)
        engine = Engine(
            self.ours, settings, pool, read_adapter=lambda item: self.tensors[item.name]
        )
        for number in range(num_adapters):
            engine.put_adapter(self.image(number, rank))
        return engine

    def add(self, engine: Engine, index: int, adapter: AdapterId | None, num_tokens: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
        prompt = tuple(self.prompts[index % len(self.prompts)])
        engine.add(GenerateJob(str(index), prompt, params, adapter_id=adapter))

    def flashserve(self, engine: Engine, num_adapters: int, rank: int) -> float:
        begin = time.perf_counter()
        for index in range(CONCURRENT):
            number = index % num_adapters if num_adapters else 0
            adapter = AdapterId(f"{rank}-{number}@1") if num_adapters else None
            self.add(engine, index, adapter, self.num_tokens)
        num_tokens = 0
        while engine.has_work:
            num_tokens += len(engine.step())
        assert num_tokens == CONCURRENT * self.num_tokens
        return num_tokens / (time.perf_counter() - begin)

    def generate(self, model: Any, prompts: list[list[int]], **options: Any) -> float:
        """Seconds of one padded batch."""
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(item)) + item for item in prompts])
        mask = torch.tensor([[0] * (width - len(item)) + [1] * len(item) for item in prompts])
        begin = time.perf_counter()
        model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            **options,
        )
        return time.perf_counter() - begin

    def rate(self, seconds: float) -> float:
        return CONCURRENT * self.num_tokens / seconds

    def peft_mixed(self) -> float:
        names = [f"a{index % 8}" for index in range(CONCURRENT)]
        return self.rate(self.generate(self.peft, self.prompts, adapter_names=names))

    def merged(self) -> float:
        """Each of 8 adapters in turn, with its two requests."""
        begin = time.perf_counter()
        for number in range(8):
            self.peft.merge_adapter([f"a{number}"])
            self.generate(self.peft, self.prompts[number::8])
            self.peft.unmerge_adapter()
        return self.rate(time.perf_counter() - begin)


def adapter_bytes(model: nn.Module, rank: int) -> int:
    """Of one adapter on all linear layers of the decoder, in bfloat16: what a step reads more."""
    return sum(
        2 * rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    )


def make_bench(directory: Any, num_tokens: int) -> Bench:
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"autocast_adapter_dtype": False}
        adapted = peft.get_peft_model(copy.deepcopy(theirs), config, "a0", **options)
        for number in range(1, 8):
            adapted.add_adapter(f"a{number}", config, **options)
    draw = random.Random(SEED)
    lengths = [64, 16, 96, 32, 80, 48, 24, 72] * 2
    prompts = [[draw.randrange(100, 49000) for _ in range(length)] for length in lengths]
    ours = base_bench.load(directory)
    return Bench(ours, theirs, adapted.eval(), num_tokens, prompts, {})


def measure(bench: Bench, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each row, the rows taking turns."""
    rows: dict[str, Callable[[], float]] = {}
    for number, rank in ((0, 8), (1, 8), (8, 8), (16, 8), (16, 16), (16, 64)):
        engine = bench.make_engine(number, rank)
        name = f"{number} of rank {rank}" if number else "base"

        def run(engine: Engine = engine, number: int = number, rank: int = rank) -> float:
            return bench.flashserve(engine, number, rank)

        rows[name] = run
    rows["PEFT mixed"] = bench.peft_mixed
    rows["merged, swapping"] = bench.merged
    rows["transformers"] = lambda: bench.rate(bench.generate(bench.theirs, bench.prompts))
    for call in rows.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, call in rows.items():
            samples[name].append(call())
    return samples


def miss_added_ms(bench: Bench, num_adapters: int, room: int, num_requests: int) -> list[float]:
    """Milliseconds that a miss adds to a first token; zipf popularity, one request at a time."""
    engine = bench.make_engine(num_adapters, 8, room=room)
    draw = random.Random(SEED)
    weights = [1 / (number + 1) for number in range(num_adapters)]
    added = []
    for number in draw.choices(range(num_adapters), weights, k=num_requests):
        adapter = AdapterId(f"8-{number}@1")
        if adapter not in engine.resident_adapters:
            first, again = (_first_token_ms(bench, engine, adapter) for _ in range(2))
            added.append(first - again)
    return added


def _first_token_ms(bench: Bench, engine: Engine, adapter: AdapterId) -> float:
    begin = time.perf_counter()
    bench.add(engine, 1, adapter, 1)
    while engine.has_work:
        engine.step()
    return 1000 * (time.perf_counter() - begin)


def paired(samples: dict[str, list[float]], row: str, peer: str) -> float:
    """The median over the rounds of how many times faster `row` was than `peer`."""
    return common.median(a / b for a, b in zip(samples[row], samples[peer], strict=True))


def limits(bench: Bench) -> str:
    """What reading the adapters alone allows, if bytes took the same time as the base's."""
    base = sum(item.numel() * 2 for item in bench.ours.parameters())
    lines = []
    for number in FRACTIONS:
        extra = number * adapter_bytes(bench.ours, 8)
        lines.append(
            f"{number} adapters of rank 8: {extra / 1e6:.1f} MB more per step beside "
            f"{base / 1e6:.0f} MB, so at most {base / (base + extra):.3f} of a step that only "
            "reads weights"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short: 3 rounds, 16 new tokens")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    with common.demo_model() as directory:
        bench = make_bench(directory, num_tokens=16 if args.quick else 64)
        samples = measure(bench, repeats=3 if args.quick else 7)
        misses = miss_added_ms(bench, *((100, 8, 60) if args.quick else (1000, 64, 400)))
    values = {
        f"base_fraction_{number}": common.value(
            paired(samples, f"{number} of rank 8", "base"), "x", better="higher", aim=aim
        )
        for number, aim in FRACTIONS.items()
    }
    values["miss_added_ttft_p95_ms"] = common.value(
        common.percentile(misses, 95), "ms", better="lower", aim=MISS_AIM_MS
    )
    common.write_report(
        "lora",
        seed=SEED,
        rows=[
            {"row": name, "unit": "tok/s", **common.spread(rates)}
            for name, rates in samples.items()
        ],
        ratios={"vs_peft_mixed_8": paired(samples, "8 of rank 8", "PEFT mixed")},
        values=values,
        aims=AIMS,
        notes=__doc__,
        json_file=args.json,
    )
    print("\n" + limits(bench))


if __name__ == "__main__":
    main()
