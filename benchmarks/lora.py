"""How fast many fine-tunes of one base answer together, beside the base alone and beside PEFT.

One process, one thread for all, peers included; the real small model in bfloat16, 16 concurrent
greedy requests of random tokens (8 to 24 each), end of text ignored; random adapters on all linear
layers of the decoder. The clock covers everything from ids to ids, prompts included; adapters are
resident, except in the miss measure. Nothing else is cached: prefix reuse is off. One short call of
each row comes first, uncounted; then the rows take turns, in another order in each round, and a
fraction is the median over the rounds of row / base. The slow peers sit out the later rounds.

  base               FlashServe without adapters
  N of rank R        FlashServe, the 16 requests spread over N adapters of rank R
  PEFT mixed         PEFT's `adapter_names`, 8 adapters of rank 8, in one batch
  merged, swapping   one adapter merged at a time: unmerge, merge, its requests, the next one
  transformers       `generate` without adapters

Each engine has the memory for adapters that is the default, or what its adapters take if that is
more. A limit of bytes is what a fraction could be if a step only read weights, each byte taking
the same time; that of bytes and launches has a pair of empty products in each group of layers
besides.

A miss is a request whose adapter is in DRAM but not in the worker's memory, which has room for 64
of 1,000 registered (zipf popularity; --quick: 16 of 250): its time to first token over HTTP, from
the request's sending, less the median of those whose adapter was there. A whole server with its
defaults but for that room, one request at a time, prompts of 16 random tokens. The adapters are
as PEFT saves them, in float32, eight contents in turn. The same is measured of the engine alone,
whose adapters are bfloat16 in anonymous memory. `exact` compares greedy float32 tokens of a batch
of eight adapters and the base with PEFT's, token for token.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import mmap
import pathlib
import random
import sys
import tempfile
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
import lora_exact
import lora_served
from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.engine.runner import allocate_pool
from flashserve.messages.work import AdapterImage, GenerateJob, LoraLayer
from flashserve.store.device.bind import reader
from flashserve.types import AdapterId, SamplingParams, TensorSlice

SEED = 0
CONCURRENT = 16
PEER_ROWS = ("PEFT mixed", "merged, swapping", "transformers")
AIMS = {"vs_peft_mixed_8": 2.0}
FRACTIONS = {1: 0.95, 8: 0.88, 16: 0.80}
MISS_AIM_MS = 30.0
_POOL_BYTES = 192 << 20
_ARENA_BYTES = 512 << 20
_CONTENTS = 4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_PRODUCTS_PER_LAYER = 8  # a pair for each group of layers that share an input


class Arena:
    """Random adapters in anonymous memory, packed as the store packs them."""

    def __init__(self, model: nn.Module) -> None:
        self._memory = mmap.mmap(-1, _ARENA_BYTES)
        self._used = 0
        self._linears = [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
        self._layers: dict[tuple[int, int], tuple[LoraLayer, ...]] = {}
        self.read = reader(self._memory)

    def image(self, number: int, rank: int) -> AdapterImage:
        """An adapter; those whose numbers differ by _CONTENTS share their bytes in the arena."""
        key = (number % _CONTENTS, rank)
        if key not in self._layers:
            self._layers[key] = tuple(
                LoraLayer(
                    name,
                    2.0,
                    self._put(f"{name} A", (rank, module.in_features)),
                    self._put(f"{name} B", (module.out_features, rank)),
                )
                for name, module in self._linears
            )
        return AdapterImage(AdapterId(f"{rank}-{number}@1"), self._layers[key])

    def _put(self, name: str, shape: tuple[int, int]) -> TensorSlice:
        item = TensorSlice(name, "BF16", shape, self._used, 2 * shape[0] * shape[1])
        self._used += item.num_bytes
        self.read(item).copy_(torch.randn(shape) * 0.01)
        return item


@dataclasses.dataclass
class Bench:
    """The models and the workload; each row returns new tokens per second."""

    ours: nn.Module
    theirs: Any
    peft: Any
    num_tokens: int
    prompts: list[list[int]]
    arena: Arena
    pool: torch.Tensor
    """For keys and values, of all engines in turn: where memory lies makes some of the difference
    between two runs."""

    def make_engine(self, num_adapters: int, rank: int, *, room: int | None = None) -> Engine:
        """Args: room: adapters that fit the memory; all, and the default, if not given."""
        one = adapter_bytes(self.ours, rank)
        settings = EngineSettings(reuse_prefixes=False)
        num_bytes = one * room if room else max(settings.adapter_bytes, one * num_adapters)
        settings = settings.model_copy(update={"adapter_bytes": num_bytes})
        engine = Engine(self.ours, settings, self.pool, read_adapter=self.arena.read)
        for number in range(num_adapters):
            engine.put_adapter(self.arena.image(number, rank))
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
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"autocast_adapter_dtype": False}
        adapted = peft.get_peft_model(copy.deepcopy(theirs), config, "a0", **options)
        for number in range(1, 8):
            adapted.add_adapter(f"a{number}", config, **options)
    draw = random.Random(SEED)
    lengths = [16, 8, 24, 12, 20, 14, 10, 24] * 2
    prompts = [[draw.randrange(100, 49000) for _ in range(length)] for length in lengths]
    ours = base_bench.load(directory)
    pool = allocate_pool(_POOL_BYTES)
    return Bench(ours, theirs, adapted.eval(), num_tokens, prompts, Arena(ours), pool)


def measure(bench: Bench, repeats: int, peer_repeats: int) -> dict[str, list[float]]:
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
    num_tokens, bench.num_tokens = bench.num_tokens, 4
    for call in rows.values():
        call()
    bench.num_tokens = num_tokens
    samples: dict[str, list[float]] = {name: [] for name in rows}
    draw = random.Random(SEED)
    for number in range(repeats):
        for name in draw.sample(list(rows), len(rows)):
            if number < peer_repeats or name not in PEER_ROWS:
                samples[name].append(rows[name]())
        progress(f"round {number + 1} of {repeats}: done")
    return samples


def measure_served(
    bench: Bench, directory: pathlib.Path, shape: lora_served.Shape
) -> lora_served.FirstTokens:
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in bench.ours.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    with tempfile.TemporaryDirectory(prefix="fs-bench-") as scratch:
        adapters = lora_served.write_adapters(pathlib.Path(scratch), linears, 8, SEED)
        bytes_each = adapter_bytes(bench.ours, 8)
        return lora_served.measure(directory, adapters, bytes_each, shape, SEED, progress)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def miss_values(served: lora_served.FirstTokens, in_engine: list[float]) -> dict[str, Any]:
    usual = common.median(served.hits)
    added = [time_ms - usual for time_ms in served.misses]
    return {
        "miss_added_ttft_p95_ms": common.value(
            common.percentile(added, 95), "ms", better="lower", aim=MISS_AIM_MS
        ),
        "miss_added_ttft_p50_ms": common.value(common.median(added), "ms", better="lower"),
        "hit_ttft_p50_ms": common.value(usual, "ms", better="lower"),
        "hit_ttft_p95_ms": common.value(common.percentile(served.hits, 95), "ms", better="lower"),
        "num_misses": common.value(len(added), "requests", better="higher"),
        "miss_added_in_engine_p95_ms": common.value(
            common.percentile(in_engine, 95), "ms", better="lower"
        ),
    }


def miss_added_ms(bench: Bench, shape: lora_served.Shape) -> list[float]:
    """Milliseconds that a miss adds to a first token of the engine alone."""
    engine = bench.make_engine(shape.num_adapters, 8, room=shape.room)
    draw = random.Random(SEED)
    weights = [1 / (number + 1) for number in range(shape.num_adapters)]
    hits, misses = [], []
    _first_token_ms(bench, engine, AdapterId("8-0@1"))
    for number in draw.choices(range(shape.num_adapters), weights, k=shape.num_requests):
        adapter = AdapterId(f"8-{number}@1")
        times = hits if adapter in engine.resident_adapters else misses
        times.append(_first_token_ms(bench, engine, adapter))
    usual = common.median(hits)
    return [time_ms - usual for time_ms in misses]


def _first_token_ms(bench: Bench, engine: Engine, adapter: AdapterId) -> float:
    begin = time.perf_counter()
    bench.add(engine, 1, adapter, 1)
    while engine.has_work:
        engine.step()
    return 1000 * (time.perf_counter() - begin)


def paired(samples: dict[str, list[float]], row: str, peer: str) -> float:
    """The median over the rounds, those that have both, of how many times faster `row` was."""
    return common.median(a / b for a, b in zip(samples[row], samples[peer], strict=False))


def limits(bench: Bench, base_rate: float) -> dict[str, dict[str, Any]]:
    """The most that each fraction can be, as the head of this file says."""
    base = sum(item.numel() * 2 for item in bench.ours.parameters())
    empty = torch.zeros(1, 1, 1, dtype=torch.bfloat16)
    begin = time.perf_counter()
    for _ in range(1000):
        torch.bmm(empty, empty)
    launch_s = (time.perf_counter() - begin) / 1000
    num_layers = bench.theirs.config.num_hidden_layers
    launches = num_layers * _PRODUCTS_PER_LAYER * launch_s / (CONCURRENT / base_rate)
    values = {}
    for number in FRACTIONS:
        extra = number * adapter_bytes(bench.ours, 8)
        values |= {
            f"extra_bytes_{number}": common.value(extra, "B", better="lower"),
            f"limit_bytes_{number}": common.value(base / (base + extra), "x", better="higher"),
            f"limit_bytes_launches_{number}": common.value(
                1 / (1 + extra / base + launches), "x", better="higher"
            ),
        }
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="short: fewer rounds, tokens and misses"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    shape = lora_served.Shape(250, 16, 150) if args.quick else lora_served.Shape(1000, 64, 500)
    with common.demo_model() as directory:
        bench = make_bench(directory, num_tokens=32 if args.quick else 48)
        served = measure_served(bench, directory, shape)
        samples = measure(bench, *((3, 1) if args.quick else (7, 3)))
        misses = miss_added_ms(bench, shape)
        exact = lora_exact.is_exact(directory, SEED)
    values = {
        f"base_fraction_{number}": common.value(
            paired(samples, f"{number} of rank 8", "base"), "x", better="higher", aim=aim
        )
        for number, aim in FRACTIONS.items()
    }
    for rank in (16, 64):
        fraction = paired(samples, f"16 of rank {rank}", "base")
        values[f"base_fraction_16_rank_{rank}"] = common.value(fraction, "x", better="higher")
    values |= miss_values(served, misses)
    values["exact"] = {
        "value": exact,
        "unit": "(1: yes)",
        "better": "higher",
        "aim": True,
        "met": exact,
    }
    values |= limits(bench, common.median(samples["base"]))
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
    print(f"  exact: {str(exact).lower()}")


if __name__ == "__main__":
    main()
