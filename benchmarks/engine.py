"""How fast the engine generates, beside transformers and beside the machine's own limits.

One process, the real small model in bfloat16, greedy, the same prompts for all (random tokens, of
different lengths), end of text ignored. The clock covers everything from ids to ids: prompt and
new tokens, and whatever a call sets up for itself; loading is outside. Nothing is cached between
calls: prefix reuse is off. One call of each comes first, uncounted; then the rows take turns.

  generate              transformers, `model.generate`; a batch is padded on the left
  generate_batch        transformers' continuous batching, with a pool of 8192 tokens
  flashserve            Engine.add and step until done
  flashserve invariant  the same with batch_invariant, whose bf16 results never depend on the batch
  forward, no cache     a limit: transformers' forward of one token for each sequence, nothing read
  linears alone         a limit: only the products with the weights
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import mmap
import os
import pathlib
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

import common
from flashserve.config import EngineSettings
from flashserve.engine import loading
from flashserve.engine.engine import Engine
from flashserve.engine.runner import allocate_pool
from flashserve.messages.work import GenerateJob
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.device.bind import bind
from flashserve.types import SamplingParams, TensorSlice

SEED = 0
CONCURRENCIES = (1, 8)
AIMS = {"vs_generate_1": 1.15, "vs_generate_8": 1.0}
PEERS = {"vs_generate_1": (1, "generate"), "vs_generate_8": (8, "generate")}
PEERS["vs_generate_batch_8"] = (8, "generate_batch")


def load(directory: pathlib.Path) -> nn.Module:
    """The model as a worker holds it: computing from the mapped file itself."""
    config = json.loads((directory / "config.json").read_text())
    tensors = tuple(
        TensorSlice(item.name, item.dtype, item.shape, item.begin, item.end - item.begin)
        for item in read_layout(directory).tensors
    )
    model = loading.build_skeleton(config, torch.bfloat16)
    with (directory / "model.safetensors").open("rb") as file:
        image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    bind(model, tensors, image, None)
    return model


@dataclasses.dataclass
class Bench:
    """The models and the workload; each method returns new tokens per second."""

    ours: nn.Module
    theirs: Any
    pool: torch.Tensor
    num_tokens: int
    prompts: list[list[int]]

    def generate(self, prompts: list[list[int]]) -> float:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(item)) + item for item in prompts])
        mask = torch.tensor([[0] * (width - len(item)) + [1] * len(item) for item in prompts])
        begin = time.perf_counter()
        output = self.theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=self.num_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert output.shape[1] == width + self.num_tokens
        return len(prompts) * self.num_tokens / (time.perf_counter() - begin)

    def generate_batch(self, prompts: list[list[int]]) -> float:
        begin = time.perf_counter()
        outputs = self.theirs.generate_batch(
            prompts,
            generation_config=transformers.GenerationConfig(
                max_new_tokens=self.num_tokens, do_sample=False, eos_token_id=-1
            ),
            continuous_batching_config=transformers.ContinuousBatchingConfig(
                num_blocks=32, max_batch_tokens=512
            ),
        )
        num_tokens = sum(len(output.generated_tokens) for output in outputs.values())
        assert num_tokens == len(prompts) * self.num_tokens
        return num_tokens / (time.perf_counter() - begin)

    def engine(self, *, batch_invariant: bool) -> Engine:
        settings = EngineSettings(reuse_prefixes=False, batch_invariant=batch_invariant)
        return Engine(self.ours, settings, self.pool)

    def flashserve(self, prompts: list[list[int]], *, batch_invariant: bool = False) -> float:
        engine = self.engine(batch_invariant=batch_invariant)
        begin = time.perf_counter()
        self.add_all(engine, prompts)
        num_tokens = 0
        while engine.has_work:
            num_tokens += len(engine.step())
        assert num_tokens == len(prompts) * self.num_tokens
        return num_tokens / (time.perf_counter() - begin)

    def add_all(self, engine: Engine, prompts: list[list[int]]) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=self.num_tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            engine.add(GenerateJob(str(index), tuple(prompt), params))

    @torch.inference_mode()
    def forward(self, prompts: list[list[int]]) -> float:
        ids = torch.tensor([item[:1] for item in prompts])
        return len(prompts) / _per_call_s(lambda: self.theirs(ids, use_cache=False))

    @torch.inference_mode()
    def linears(self, prompts: list[list[int]]) -> float:
        parts = [part for part in self.ours.modules() if isinstance(part, nn.Linear)]
        widths = {part.in_features for part in parts}
        rows = {width: torch.randn(len(prompts), width).bfloat16() for width in widths}

        def all_linears() -> None:
            for part in parts:
                part(rows[part.in_features])

        return len(prompts) / _per_call_s(all_linears)

    def attention_ms(self, prompts: list[list[int]]) -> float:
        """Of one decode step, in the attention operator itself."""
        engine = self.engine(batch_invariant=False)
        self.add_all(engine, prompts)
        for _ in range(self.num_tokens // 2):
            engine.step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            for _ in range(4):
                engine.step()
        found = (item for item in profile.key_averages() if "flash_attention" in item.key)
        return sum(item.self_cpu_time_total for item in found) / 4 / 1000


def _per_call_s(call: Callable[[], object], num_calls: int = 10) -> float:
    begin = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - begin) / num_calls


def measure(bench: Bench, concurrency: int, repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each row, the rows taking turns."""
    prompts = bench.prompts[:concurrency]
    rows: dict[str, Callable[[], float]] = {
        "generate": lambda: bench.generate(prompts),
        "flashserve": lambda: bench.flashserve(prompts),
        "flashserve invariant": lambda: bench.flashserve(prompts, batch_invariant=True),
        "forward, no cache": lambda: bench.forward(prompts),
        "linears alone": lambda: bench.linears(prompts),
    }
    if concurrency > 1:
        rows["generate_batch"] = lambda: bench.generate_batch(prompts)
    for call in rows.values():
        call()
    samples: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(repeats):
        for name, call in rows.items():
            samples[name].append(call())
    return samples


def paired(samples: dict[str, list[float]], row: str, peer: str) -> float:
    """The median over the rounds of how many times faster `row` was than `peer`."""
    return common.median(a / b for a, b in zip(samples[row], samples[peer], strict=True))


def sentence(bench: Bench, samples: dict[str, list[float]], concurrency: int) -> str:
    """Where the time of a FlashServe step goes that the weights do not take."""
    total = 1000 * concurrency / common.median(samples["flashserve"])
    linears = 1000 * concurrency / common.median(samples["linears alone"])
    attention = bench.attention_ms(bench.prompts[:concurrency])
    return (
        f"With {concurrency} concurrent, a new token of each takes {total:.1f} ms: "
        f"{linears:.1f} ms of products with the weights, {attention:.1f} ms of attention; the "
        f"other {total - linears - attention:.1f} ms go to the prompts, norms, rotary embedding, "
        "sampling and Python."
    )


def make_bench(directory: pathlib.Path, num_tokens: int) -> Bench:
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    draw = random.Random(SEED)
    lengths = [64, 16, 96, 32, 80, 48, 24, 72]
    return Bench(
        ours=load(directory),
        theirs=theirs,
        pool=allocate_pool(128 << 20),
        num_tokens=num_tokens,
        prompts=[[draw.randrange(100, 49000) for _ in range(length)] for length in lengths],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short: 3 rounds, 16 new tokens")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    num_cores = len(os.sched_getaffinity(0))
    threads = [1] if args.quick or num_cores < 2 else [1, 2]
    rows, sentences = [], []
    samples: dict[tuple[int, int], dict[str, list[float]]] = {}
    with common.demo_model() as directory:
        bench = make_bench(directory, num_tokens=16 if args.quick else 64)
        for num_threads in threads:
            torch.set_num_threads(num_threads)
            for concurrency in CONCURRENCIES:
                found = measure(bench, concurrency, repeats=3 if args.quick else 7)
                samples[num_threads, concurrency] = found
                for name, rates in found.items():
                    row = {"threads": num_threads, "concurrent": concurrency, "row": name}
                    rows.append({**row, "unit": "tok/s", **common.spread(rates)})
                if num_threads == 1:
                    sentences.append(sentence(bench, found, concurrency))
                print(f"{num_threads} threads, {concurrency} concurrent: done", file=sys.stderr)
    one = {concurrency: samples[1, concurrency] for concurrency in CONCURRENCIES}
    common.write_report(
        "engine",
        seed=SEED,
        rows=rows,
        ratios={
            name: paired(one[concurrency], "flashserve", peer)
            for name, (concurrency, peer) in PEERS.items()
        },
        values={
            f"batch_invariant_{against}_{concurrency}": common.value(
                paired(one[concurrency], "flashserve invariant", row), "x", better="higher"
            )
            for concurrency in CONCURRENCIES
            for against, row in (("vs_plain", "flashserve"), ("vs_generate", "generate"))
        },
        aims=AIMS,
        notes=__doc__,
        json_file=args.json,
    )
    print("\n" + "\n".join(sentences))


if __name__ == "__main__":
    main()
