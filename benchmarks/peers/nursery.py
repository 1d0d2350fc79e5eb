"""Forks one fresh process per measured load, from a parent that has imported everything big.

`python nursery.py FD`: jobs come over the Unix socket FD, results go back. The parent only imports
and runs one forward on one thread, so that its children need not; it never loads anything.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import pathlib
import re
import socket
import sys
import time
import traceback

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
import xxhash
from torch import nn

from peers import local, ours, remote
from peers.job import Job, Loaded, Setup

PROMPT_TOKENS = 8
_REASON_CHARACTERS = 100
LOADERS: dict[str, Setup] = {
    function.__name__: function
    for function in (
        local.safetensors_load_file,
        local.safetensors_clone,
        local.from_pretrained,
        local.torch_load_mmap,
        local.runai_streamer,
        local.fastsafetensors,
        local.tensorizer,
        local.raw_o_direct,
        local.save_for_torch,
        local.save_for_tensorizer,
        remote.boto3_download,
        remote.s5cmd_copy,
        remote.runai_s3,
        remote.range_parallel,
        ours.dram_ready,
        ours.dram_copy,
        ours.from_source,
        ours.load_model,
    )
}


@dataclasses.dataclass(slots=True)
class Memory:
    """Bytes of this process."""

    rss: int
    pss: int
    peak_rss: int

    @classmethod
    def now(cls) -> Memory:
        rollup = pathlib.Path("/proc/self/smaps_rollup").read_text()
        status = pathlib.Path("/proc/self/status").read_text()
        return cls(_kib(rollup, "Rss"), _kib(rollup, "Pss"), _kib(status, "VmHWM"))


def _kib(text: str, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def empty_model(config: dict) -> nn.Module:
    """What loaders of mere tensors are given to put them into: on meta, rotary tables made."""
    model = ours.skeleton(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    return model


def first_token(loaded: dict[str, torch.Tensor] | nn.Module, empty: nn.Module) -> int:
    if isinstance(loaded, dict):
        empty.load_state_dict(loaded, assign=True)
        loaded = empty
    with torch.inference_mode():
        logits = loaded(torch.arange(PROMPT_TOKENS)[None], logits_to_keep=1).logits
    return int(logits[0, -1].argmax())


def damaged(loaded: dict[str, torch.Tensor] | nn.Module, digests: dict[str, str]) -> list[str]:
    """Names whose bytes are not those that the generator wrote."""
    tensors = loaded if isinstance(loaded, dict) else loaded.state_dict()
    found = {
        name: xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).numpy())
        for name, tensor in tensors.items()
    }
    return sorted(name for name in found.keys() | digests if found.get(name) != digests.get(name))


def measure(job: Job, link: socket.socket) -> dict:
    """One load: clocked from the parent's word to the last byte, and on to the first token."""
    os.environ.update(job.env)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    load = LOADERS[job.loader](job)
    empty = empty_model(job.config)
    first_token(_tiny_model(), empty)  # starts the compute threads
    gc.collect()
    gc.freeze()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    idle = Memory.now()
    link.send(b"ready")
    assert link.recv(16) == b"go"
    began = time.monotonic()
    loaded: Loaded = load()
    resident_s = time.monotonic() - began
    after = Memory.now()
    result = {
        "resident_s": resident_s,
        "idle_rss": idle.rss,
        "peak_rss": after.peak_rss,
        "pss": after.pss,
        **job.extras,
    }
    if loaded is not None:
        resumed = time.monotonic()
        token = first_token(loaded, empty)
        result |= {"first_token_s": resident_s + time.monotonic() - resumed, "token": token}
        if wrong := damaged(loaded, job.digests):
            raise ValueError(f"{len(wrong)} tensors are not what was written, first {wrong[0]}")
    return result


def _tiny_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def _child(job: Job, link: socket.socket) -> None:
    link.send(b"pid %d" % os.getpid())
    try:
        answer = measure(job, link)
    except BaseException as error:
        traceback.print_exc()
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        answer = {"error": f"{type(error).__name__}: {lines[0]}"[:_REASON_CHARACTERS]}
    link.send(json.dumps(answer).encode())
    sys.stderr.flush()
    os._exit(0)  # what the libraries would tear down is of no interest


def main() -> None:
    link = socket.socket(fileno=int(sys.argv[1]))
    torch.set_num_threads(1)
    first_token(_tiny_model(), nn.Identity())
    gc.collect()
    gc.freeze()
    link.send(b"nursery")
    while message := link.recv(1 << 20):
        if message == b"go":  # meant for a child that died first
            continue
        job = Job(**json.loads(pathlib.Path(message.decode()).read_text()))
        if not (pid := os.fork()):
            _child(job, link)
        _, status = os.waitpid(pid, 0)
        link.send(b"ended %d" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
