"""FlashServe's own loads, through the code that a node and its workers run."""

from __future__ import annotations

import concurrent.futures
import ctypes
import importlib
import mmap
import pathlib
import statistics
import time
from typing import Any

import numpy as np
import torch
from torch import nn

from flashserve.store.device.bind import bind
from flashserve.store.dram.arena import attach
from flashserve.types import ModelId, ModelSpec, TensorSlice, Tier
from peers.job import Job, Load, Loaded, faulted_buffer, pieces
from stores import open_store

COPY_BYTES = 8 << 20
MEMCPY_REPEATS = 5
_POPULATE_READ = 22  # MADV_POPULATE_READ, Linux 5.14
_ARENA_SPARE_BYTES = 64 << 20


def skeleton(config: dict[str, Any]) -> nn.Module:
    """The model without weights, as a spare worker builds it ahead."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**config)).to(torch.bfloat16)
    return model.eval()


def _mapped(job: Job) -> tuple[mmap.mmap, tuple[TensorSlice, ...]]:
    """The node's arena, mapped by this process as a worker maps it, its page tables filled."""
    arena = attach(job.options["arena_fd"], job.options["arena_bytes"])
    tensors = tuple(
        TensorSlice(name, dtype, tuple(shape), offset, num_bytes)
        for name, dtype, shape, offset, num_bytes in job.options["tensors"]
    )
    begin = min(tensor.offset for tensor in tensors) // mmap.PAGESIZE * mmap.PAGESIZE
    end = max(tensor.offset + tensor.num_bytes for tensor in tensors)
    arena.madvise(_POPULATE_READ, begin, end - begin)
    return arena, tensors


def dram_ready(job: Job) -> Load:
    arena, tensors = _mapped(job)
    model = skeleton(job.config)

    def load() -> Loaded:
        bind(model, tensors, arena, torch.bfloat16)
        return model

    return load


def dram_copy(job: Job) -> Load:
    """Also compares, just before, with copies between two private buffers of this size: in turn,
    for the rate of a single copy of either kind depends more on the moment than on the kind.
    """
    arena, tensors = _mapped(job)
    begin = min(tensor.offset for tensor in tensors)
    num_bytes = max(tensor.offset + tensor.num_bytes for tensor in tensors) - begin
    num_threads = job.options["threads"]
    pool = concurrent.futures.ThreadPoolExecutor(num_threads)
    target, other = faulted_buffer(num_bytes), faulted_buffer(num_bytes)
    whole = np.frombuffer(arena, np.uint8)
    source_address = whole.ctypes.data + begin

    def copy(destination: int, source: int) -> None:
        def move(piece: tuple[int, int]) -> None:
            ctypes.memmove(destination + piece[0], source + piece[0], piece[1])

        list(pool.map(move, pieces(num_bytes, COPY_BYTES)))

    sources = {"memcpy_s": other.data_ptr(), "copy_s": source_address}
    samples: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(MEMCPY_REPEATS):
        for name, source in sources.items():
            began = time.monotonic()
            copy(target.data_ptr(), source)
            samples[name].append(time.monotonic() - began)
    job.extras |= {name: statistics.median(taken) for name, taken in samples.items()}
    job.extras["copied_bytes"] = num_bytes

    job.options["alive"] = whole  # an address alone does not keep the mapping

    def load() -> Loaded:
        copy(target.data_ptr(), source_address)
        return {
            tensor.name: target[tensor.offset - begin :][: tensor.num_bytes]
            .view(torch.bfloat16)
            .view(tensor.shape)
            for tensor in tensors
        }

    return load


def from_source(job: Job) -> Load:
    """A node's store and a worker's mapping: source to arena, then bound."""
    arena_bytes = job.options["image_bytes"] + _ARENA_SPARE_BYTES
    store = open_store(pathlib.Path(job.scratch), arena_bytes, prefault=job.options["prefault"])
    mapping = attach(store.arena.fd, store.arena.num_bytes)
    model = skeleton(job.config)
    source = job.options["source"]
    lowest = Tier.REMOTE if source.startswith("s3:") else Tier.DISK
    if lowest is Tier.REMOTE:
        importlib.import_module("boto3")  # as every client here does before its clock starts
    spec = ModelSpec(ModelId("bench"), source, job.options["image_bytes"], lowest)

    def load() -> Loaded:
        store.stage(spec, Tier.DRAM)
        lease = store.lease(spec.model_id)
        job.options["alive"] = (store, lease)
        bind(model, lease.tensors, mapping, torch.bfloat16)
        return model

    return load


def load_model(job: Job) -> Load:
    """What a user's own process calls, with a node running that has the bytes in DRAM."""
    from flashserve import load_model as load_from_node
    from flashserve.store.handout.client import socket_path

    if not socket_path(pathlib.Path(job.env["FLASHSERVE_DATA_DIR"])).is_socket():
        raise RuntimeError("no node hands models out")  # it would read the files itself

    return lambda: load_from_node(job.options["source"])
