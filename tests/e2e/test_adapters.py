"""LoRA adapters through the real server: two trained ones, mixed with their base."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.e2e.conftest import REPOSITORY
from tests.e2e.harness import MODEL, QUESTION, Server, events, eventually, running

NAMES = (MODEL, "shout", "pirate")
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def trained(checkpoint: Path) -> Path:
    """The two adapters, trained once per clone."""
    root = REPOSITORY / ".demo" / "adapters"
    script = Path(__file__).with_name("training.py")
    subprocess.run([sys.executable, str(script), str(checkpoint), str(root)], check=True)
    return root


@pytest.fixture(scope="module")
def lora(checkpoint: Path, trained: Path) -> Iterator[Server]:
    """A server that computes in float32, so that nothing depends on what else is in a batch."""
    with running(checkpoint, ENGINE__DTYPE="float32", NODE__DRAM_BYTES="1GiB") as started:
        for name in NAMES[1:]:
            added = started.cli("adapter", "add", MODEL, name, str(trained / name))
            assert added.returncode == 0, added.stderr
            assert f"{name} is ready: version 1, rank 8" in added.stdout
        yield started
        assert started.stop() == 0, started.log()


def answer(server: Server, model: str, **fields: Any) -> dict[str, Any]:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        **fields,
    }
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]


@pytest.fixture(scope="module")
def wanted(checkpoint: Path, trained: Path) -> dict[str, str]:
    """What PEFT and transformers answer, each adapter alone, greedily in float32."""
    script = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
checkpoint, root, question, num_tokens = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
)
def generate(model):
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    done = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=int(num_tokens), do_sample=False
    )
    return tokenizer.decode(done[0, len(prompt):], skip_special_tokens=True)
answers = {"smollm2": generate(model)}
peft = PeftModel.from_pretrained(model, f"{root}/shout", adapter_name="shout")
peft.load_adapter(f"{root}/pirate", adapter_name="pirate")
for name in ("shout", "pirate"):
    peft.set_adapter(name)
    answers[name] = generate(peft)
print(json.dumps(answers))
"""
    command = [sys.executable, "-c", script, str(checkpoint), str(trained), QUESTION]
    done = subprocess.run([*command, str(NUM_TOKENS)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_mixed_batch_answers_as_peft_does_adapter_by_adapter(
    lora: Server, wanted: dict[str, str]
) -> None:
    assert len(set(wanted.values())) == len(NAMES)
    names = [*NAMES, *reversed(NAMES), *(f"{MODEL}:{name}" for name in NAMES[1:])]
    with concurrent.futures.ThreadPoolExecutor(len(names)) as pool:
        replies = list(pool.map(lambda name: answer(lora, name), names))
    for name, reply in zip(names, replies, strict=True):
        assert text_of(reply) == wanted[name.rpartition(":")[2]]
        assert reply["model"] == name
        adapter = None if name == MODEL else f"{name.rpartition(':')[2]}@1"
        assert reply["flashserve"]["adapter"] == adapter


def test_the_effect_of_each_adapter_is_plain_to_see(lora: Server) -> None:
    shouted = text_of(answer(lora, "shout"))
    assert shouted == shouted.upper()
    assert text_of(answer(lora, "pirate")).startswith("Arr!")


def test_models_and_the_list_show_adapters_with_their_base(lora: Server) -> None:
    listed = httpx.get(f"{lora.url}/v1/models").json()["data"]
    assert [(each["id"], each.get("parent")) for each in listed] == [
        (MODEL, None),
        ("pirate", MODEL),
        ("shout", MODEL),
    ]
    answer(lora, "shout")
    shown = json.loads(lora.cli("adapter", "list", "--json").stdout)
    shout = next(each for each in shown if each["name"] == "shout")
    assert shout["requests"] >= 1
    assert shout["tokens"] >= 1
    assert shout["tier"] == "dram"
    assert shout["advice"] == "multiplex"
    table = lora.cli("adapter", "list").stdout
    assert "multiplex" in table


def test_adapters_survive_a_worker_a_stopped_replica_and_a_restart(
    lora: Server, wanted: dict[str, str]
) -> None:
    def agrees() -> bool:
        return all(text_of(answer(lora, name)) == wanted[name] for name in NAMES)

    assert agrees()
    for worker in lora.workers():
        worker.kill()
    assert agrees()
    assert lora.cli("evict", MODEL, "--tier", "dram").returncode == 0
    assert agrees()
    assert lora.stop() == 0
    lora.start()
    eventually(lambda: httpx.get(f"{lora.url}/readyz").status_code == 200, "ready again")
    assert agrees()


def streamed(
    server: Server, model: str, interrupt: Callable[[], None], **fields: Any
) -> tuple[str, dict[str, Any]]:
    """The text and the receipt of one stream; `interrupt` is called after its first tokens."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "stream": True,
        **fields,
    }
    texts: list[str] = []
    receipt: dict[str, Any] = {}
    was_interrupted = False
    with (
        server.http() as http,
        contextlib.closing(http) as client,
        client.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        for chunk in events(reply.iter_lines()):
            texts += [choice["delta"].get("content") or "" for choice in chunk["choices"]]
            receipt = chunk.get("flashserve") or receipt
            if any(texts) and not was_interrupted:
                was_interrupted = True
                interrupt()
    return "".join(texts), receipt


def test_a_stream_of_an_adapter_goes_on_when_every_worker_is_killed(
    lora: Server, wanted: dict[str, str]
) -> None:
    def kill_all() -> None:
        for worker in lora.workers():
            worker.kill()

    text, receipt = streamed(lora, "shout", kill_all)
    assert text == wanted["shout"]
    assert receipt["resumed"] >= 1
    assert receipt["adapter"] == "shout@1"


def test_a_stream_ends_with_the_version_that_it_began_with(lora: Server, trained: Path) -> None:
    add = ("adapter", "add", MODEL, "drains")
    assert lora.cli(*add, str(trained / "shout")).returncode == 0
    options = {"max_tokens": 4 * NUM_TOKENS, "ignore_eos": True}
    whole = text_of(answer(lora, "drains", **options))

    def replace() -> None:
        assert lora.cli(*add, str(trained / "pirate"), "--replace").returncode == 0

    text, receipt = streamed(lora, "drains", replace, **options)
    assert (text, receipt["adapter"]) == (whole, "drains@1")
    reply = answer(lora, "drains")
    assert reply["flashserve"]["adapter"] == "drains@2"
    assert text_of(reply).startswith("Arr!")
    assert lora.cli("adapter", "remove", "drains").returncode == 0


def test_an_unknown_adapter_is_404_with_close_names(lora: Server) -> None:
    body = {"model": "shot", "messages": [{"role": "user", "content": "hi"}]}
    reply = httpx.post(f"{lora.url}/v1/chat/completions", json=body)
    assert reply.status_code == 404
    assert "did you mean shout" in reply.json()["error"]["message"]


def test_a_replaced_and_a_removed_adapter(lora: Server, trained: Path, tmp_path: Path) -> None:
    source = str(trained / "shout")
    assert lora.cli("adapter", "add", MODEL, "changing", source).returncode == 0
    refused = lora.cli("adapter", "add", MODEL, "changing", str(trained / "pirate"))
    assert refused.returncode == 1
    assert "replace it" in refused.stderr
    other = ("adapter", "add", MODEL, "changing", str(trained / "pirate"), "--replace")
    assert lora.cli(*other).returncode == 0
    reply = answer(lora, "changing")
    assert text_of(reply).startswith("Arr!")
    assert reply["flashserve"]["adapter"] == "changing@2"
    kept = lora.cli("delete", MODEL)
    assert kept.returncode == 1
    assert "adapters" in kept.stderr
    assert lora.cli("adapter", "remove", "changing").returncode == 0
    body = {"model": "changing", "messages": [{"role": "user", "content": "hi"}]}
    assert httpx.post(f"{lora.url}/v1/chat/completions", json=body).status_code == 404


def test_what_cannot_be_served_is_refused_in_one_line(
    lora: Server, trained: Path, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    dora = tmp_path / "dora"
    dora.mkdir()
    config = json.loads((trained / "shout" / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    weights = (trained / "shout" / "adapter_model.safetensors").read_bytes()
    (dora / "adapter_model.safetensors").write_bytes(weights)
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "adapter_config.json").write_text(json.dumps(config))
    (cut / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    for source, said in (
        (tmp_path / "empty", "nor an adapter_config.json"),
        (tmp_path / "missing", "missing"),
        (dora, "use_dora"),
        (cut, "truncated"),
        (checkpoint, "flashserve deploy"),
    ):
        refused = lora.cli("adapter", "add", MODEL, "bad", str(source))
        assert refused.returncode == 1
        assert said in refused.stderr
        assert refused.stderr.count("flashserve: error:") == 1
        assert "Traceback" not in refused.stderr
    assert "bad" not in lora.cli("adapter", "list", "--json").stdout
    wrong = lora.cli("deploy", "wrong", str(trained / "shout"))
    assert wrong.returncode == 1
    assert "flashserve adapter add" in wrong.stderr
