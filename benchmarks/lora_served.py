"""What an adapter's miss adds to a first token, as a client of a whole server sees it."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import pathlib
import random
from collections.abc import Callable

import torch
from safetensors.torch import save_file

from server import Server, deploy, running_server, stream_completion

BASE = "base"
PROMPT_TOKENS = 16
_CONTENTS = 8
_NUM_CLIENTS = 16
_ARENA_BYTES = 1 << 30
_ADAPTER_ZONE_BYTES = 256 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """Adapters of the measured server: names registered, of so many contents, and room for few."""

    num_adapters: int
    room: int
    num_requests: int


@dataclasses.dataclass(frozen=True, slots=True)
class FirstTokens:
    """Milliseconds to the first token of requests whose adapter was there, and of the others."""

    hits: list[float]
    misses: list[float]


def write_adapters(
    root: pathlib.Path, linears: dict[str, tuple[int, int]], rank: int, seed: int
) -> list[pathlib.Path]:
    """Random adapters as PEFT saves them, in float32.

    Args:
        linears: full name, in_features and out_features of each layer.
    """
    draw = torch.Generator().manual_seed(seed)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rpartition(".")[2] for name in linears}),
    }
    directories = []
    for number in range(_CONTENTS):
        directory = root / f"adapter-{number}"
        directory.mkdir(parents=True)
        tensors = {}
        for name, (inside, outside) in linears.items():
            for leaf, shape in (("A", (rank, inside)), ("B", (outside, rank))):
                tensor = torch.randn(shape, generator=draw) * 0.01
                tensors[f"base_model.model.{name}.lora_{leaf}.weight"] = tensor
        save_file(tensors, directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config))
        directories.append(directory)
    return directories


def measure(
    checkpoint: pathlib.Path,
    adapters: list[pathlib.Path],
    bytes_each: int,
    shape: Shape,
    seed: int,
    progress: Callable[[str], None],
) -> FirstTokens:
    """One streamed request at a time, adapters by zipf popularity, prompts of random tokens.

    Args:
        bytes_each: of an adapter in a worker's memory.
    """
    with running_server(
        NODE__NUM_WORKERS="1",
        NODE__DRAM_BYTES=str(_ARENA_BYTES),
        NODE__ADAPTER_BYTES=str(_ADAPTER_ZONE_BYTES),
        ENGINE__ADAPTER_BYTES=str(shape.room * bytes_each),
    ) as server:
        deploy(server, BASE, checkpoint, keep_alive_s=3600)
        _register(server, adapters, shape.num_adapters)
        progress(f"  {shape.num_adapters} adapters are registered")
        return _ask(server, shape, random.Random(seed))


def _register(server: Server, adapters: list[pathlib.Path], num_adapters: int) -> None:
    def add(number: int) -> None:
        source = str(adapters[number % len(adapters)])
        body = {"base": BASE, "name": _name(number), "source": source}
        server.admin.post("/admin/v1/adapters", json=body).raise_for_status()

    with concurrent.futures.ThreadPoolExecutor(_NUM_CLIENTS) as pool:
        list(pool.map(add, range(num_adapters)))


def _ask(server: Server, shape: Shape, draw: random.Random) -> FirstTokens:
    """Which requests miss follows from the order: the worker keeps those that were used last."""
    weights = [1 / (number + 1) for number in range(shape.num_adapters)]
    asked = list(range(shape.room))  # fills the room, uncounted
    asked += draw.choices(range(shape.num_adapters), weights, k=shape.num_requests)
    resident: collections.OrderedDict[int, None] = collections.OrderedDict()
    times = FirstTokens([], [])
    for index, number in enumerate(asked):
        prompt = [draw.randrange(100, 49000) for _ in range(PROMPT_TOKENS)]
        ttft_s, receipt = stream_completion(server, _name(number), prompt, max_tokens=1)
        if receipt["adapter"] != f"{_name(number)}@1":
            raise SystemExit(f"{receipt['adapter']} answered for {_name(number)}")
        if index >= shape.room:
            (times.hits if number in resident else times.misses).append(1000 * ttft_s)
        resident[number] = None
        resident.move_to_end(number)
        if len(resident) > shape.room:
            resident.popitem(last=False)
    return times


def _name(number: int) -> str:
    return f"tune-{number}"
