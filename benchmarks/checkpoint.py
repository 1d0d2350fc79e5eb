"""A checkpoint of random bf16 weights, made from a seed: Llama-shaped, in three sizes."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Iterator

import numpy as np
import tokenizers
import xxhash

VOCAB_TOKENS = 4096
MAX_PROMPT_TOKENS = 2048
_BF16_ONE = 0x3F80
# Sign, mantissa and the last bit of the exponent stay random; the rest of the exponent is that of
# 2**-7, so every value is finite and between 0.008 and 0.031.
_RANDOM_BITS = np.uint16(0x80FF)
_EXPONENT = np.uint16(0x3C00)


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int

    @property
    def config(self) -> dict:
        """Its config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "vocab_size": VOCAB_TOKENS,
            "max_position_embeddings": MAX_PROMPT_TOKENS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order of a forward."""
        kv_rows = self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (VOCAB_TOKENS, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            yield prefix + "input_layernorm.weight", (self.hidden,)
            for name, rows in (("q", self.hidden), ("k", kv_rows), ("v", kv_rows)):
                yield f"{prefix}self_attn.{name}_proj.weight", (rows, self.hidden)
            yield prefix + "self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield prefix + "post_attention_layernorm.weight", (self.hidden,)
            for name in ("gate", "up"):
                yield f"{prefix}mlp.{name}_proj.weight", (self.intermediate, self.hidden)
            yield prefix + "mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (VOCAB_TOKENS, self.hidden)

    @property
    def num_bytes(self) -> int:
        """Of the tensors."""
        return sum(2 * math.prod(shape) for _, shape in self.tensors())


FULL = Shape(hidden=2048, intermediate=8192, layers=20, heads=32, kv_heads=8)  # 2.47 GB
QUICK = Shape(hidden=1024, intermediate=4096, layers=15, heads=16, kv_heads=8)  # 0.49 GB
TINY = Shape(hidden=64, intermediate=512, layers=6, heads=4, kv_heads=2)  # 2.4 MB, for tests


def write(directory: pathlib.Path, shape: Shape, seed: int, num_shards: int = 1) -> dict[str, str]:
    """Writes config.json, a tokenizer, and the weights, all on disk at the end.

    Returns:
        The xxh3 of each tensor's bytes by name; the same for any num_shards.
    """
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config, indent=2))
    _tokenizer().save(str(directory / "tokenizer.json"))
    shards = _shards(shape, num_shards)
    rng = np.random.Generator(np.random.SFC64(seed))
    digests: dict[str, str] = {}
    placed: dict[str, str] = {}
    for index, shard in enumerate(shards, start=1):
        name = "model.safetensors"
        if num_shards > 1:
            name = f"model-{index:05}-of-{num_shards:05}.safetensors"
        digests |= _write_file(directory / name, shard, rng)
        placed |= dict.fromkeys((tensor for tensor, _ in shard), name)
    if num_shards > 1:
        index_file = {"metadata": {"total_size": shape.num_bytes}, "weight_map": placed}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    return digests


def _shards(shape: Shape, num_shards: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Runs of tensors with about equally many bytes each."""
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(num_shards)]
    done = 0
    for name, dimensions in shape.tensors():
        shards[done * num_shards // shape.num_bytes].append((name, dimensions))
        done += 2 * math.prod(dimensions)
    return shards


def _write_file(
    path: pathlib.Path, tensors: list[tuple[str, tuple[int, ...]]], rng: np.random.Generator
) -> dict[str, str]:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensors:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (begin, end)}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digests = {}
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in tensors:
            values = _random_bf16(math.prod(shape), rng)
            if len(shape) == 1:  # of a norm
                values[:] = _BF16_ONE
            digests[name] = xxhash.xxh3_64_hexdigest(values.data)
            file.write(values.data)
    return digests


def _random_bf16(count: int, rng: np.random.Generator) -> np.ndarray:
    words = rng.bit_generator.random_raw(-(-count // 4)).view(np.uint16)[:count]
    words &= _RANDOM_BITS
    words |= _EXPONENT
    return words


def _tokenizer() -> tokenizers.Tokenizer:
    """Names for all tokens, because a server wants a tokenizer; the prompts are token ids."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"<{token}>" for token in range(len(alphabet), VOCAB_TOKENS)]
    vocabulary = {name: token for token, name in enumerate(names)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    return tokenizer
