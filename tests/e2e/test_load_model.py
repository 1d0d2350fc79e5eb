"""Other processes load models out of the memory of a real `flashserve serve`."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.e2e.harness import MODEL, QUESTION, Server, eventually, running
from transformers import AutoModelForCausalLM, AutoTokenizer

from flashserve import load_model

NUM_TOKENS = 8

# Changes every weight in place, as merging an adapter into it does, and tells what it has then.
WRITER = """
import sys, torch
from flashserve import load_model
model = load_model(sys.argv[1])
before = [float(each.detach().sum(dtype=torch.float64)) for each in model.parameters()]
with torch.no_grad():
    for each in model.parameters():
        each.add_(1.0)
after = [float(each.detach().sum(dtype=torch.float64)) for each in model.parameters()]
print(sum(one != other for one, other in zip(before, after)), len(before), flush=True)
sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def writer(server: Server, source: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has changed all weights of its model, until the context ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, source],
        env=server.env,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            changed, total = process.stdout.readline().split()
            assert changed == total
            yield process
        finally:
            process.kill()


def assert_equal(model: torch.nn.Module, wanted: torch.nn.Module) -> None:
    ours, theirs = dict(model.named_parameters()), dict(wanted.named_parameters())
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name], value), name
    tied = [
        each.get_input_embeddings().weight is each.get_output_embeddings().weight
        for each in (model, wanted)
    ]
    assert tied == [True, True]


def answer(model: torch.nn.Module, checkpoint: Path) -> str:
    """What transformers says to QUESTION, greedily."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**prompt, max_new_tokens=NUM_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def leases(server: Server, name: str) -> int:
    return server.model(name)["leases"]


def test_a_deployed_model_is_that_of_from_pretrained_and_answers_as_the_server_does(
    server: Server, checkpoint: Path
) -> None:
    wanted = AutoModelForCausalLM.from_pretrained(checkpoint)
    named = load_model(MODEL, data_dir=server.data_dir)
    assert_equal(named, wanted)
    assert_equal(load_model(checkpoint, data_dir=server.data_dir), wanted)
    assert answer(named, checkpoint) == server.ask(max_tokens=NUM_TOKENS)


def test_what_one_process_writes_nobody_else_sees(server: Server, checkpoint: Path) -> None:
    said = server.ask(max_tokens=NUM_TOKENS)
    with writer(server, MODEL):
        other = load_model(MODEL, data_dir=server.data_dir)
        assert_equal(other, AutoModelForCausalLM.from_pretrained(checkpoint))
        assert server.ask(max_tokens=NUM_TOKENS) == said


def test_holders_are_leases_until_their_tensors_go_and_keep_them_when_the_node_evicts(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    source = tmp_path / "held"  # not that of a model with replicas, which are leases too
    shutil.copytree(checkpoint, source, copy_function=os.link)
    server.deploy("held", source)
    server.succeed("stage", "held", "--tier", "dram")
    assert leases(server, "held") == 0
    model = load_model("held", data_dir=server.data_dir)
    with writer(server, "held"):
        listed = json.loads(server.succeed("ps", "--json"))
        assert {model["name"]: model["leases"] for model in listed}["held"] == 2
        server.succeed("evict", "held", "--tier", "dram")
        assert server.model("held")["dram_bytes"] == 0
        assert leases(server, "held") == 2
    eventually(lambda: leases(server, "held") == 1, "the killed process holds nothing")
    server.succeed("delete", "held")
    wanted = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert_equal(model, wanted)
    server.deploy("held", source)
    assert leases(server, "held") == 1
    kept = model.get_input_embeddings().weight.detach()[:1]
    del model
    gc.collect()
    assert leases(server, "held") == 1
    del kept
    gc.collect()
    eventually(lambda: leases(server, "held") == 0, "no tensor is left")
    server.succeed("delete", "held")


def test_a_model_goes_on_without_its_server(checkpoint: Path) -> None:
    with running(checkpoint, NODE__NUM_WORKERS="1") as server:
        model = load_model(MODEL, data_dir=server.data_dir)
        assert server.stop() == 0, server.log()
        wanted = AutoModelForCausalLM.from_pretrained(checkpoint)
        assert answer(model, checkpoint) == answer(wanted, checkpoint)
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(1.0)
