"""Makes modules from config.json: empty ones to bind weights to, and descriptions of them."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from flashserve.engine import attention, experts
from flashserve.engine.compat import ARCHITECTURES, check_config
from flashserve.engine.runner import KVShape
from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.messages.work import ModelDescription
from flashserve.types import TensorSlice

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


# Old checkpoints hold a frequency table for each layer; it follows from the config.
_IGNORED = "rotary_emb.inv_freq"


def choose_dtype(setting: str, tensors: Iterable[TensorSlice]) -> torch.dtype:
    """The dtype to compute in: `setting`, or with "auto" the one that most of the bytes have.

    Raises:
        CheckpointError: auto, and the weights are in a dtype that is not computed in.
    """
    if setting != "auto":
        return _DTYPES[setting]
    num_bytes: dict[str, int] = {}
    for tensor in tensors:
        num_bytes[tensor.dtype] = num_bytes.get(tensor.dtype, 0) + tensor.num_bytes
    if not num_bytes:
        raise CheckpointError("the checkpoint holds no tensors")
    name = max(sorted(num_bytes), key=num_bytes.__getitem__)
    if name not in _DTYPES:
        raise CheckpointError(f"weights of dtype {name} are not supported; F32, F16 and BF16 are")
    return _DTYPES[name]


def eos_token_ids(config: dict[str, Any], generation_config: dict[str, Any]) -> tuple[int, ...]:
    """The tokens that end a text: those of generation_config.json, else those of config.json."""
    found = generation_config.get("eos_token_id")
    if found is None:
        found = config.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    return tuple(token for token in ids if isinstance(token, int))


def build_skeleton(config: dict[str, Any], dtype: torch.dtype, device: str = "meta") -> nn.Module:
    """The model that `config` (a config.json) describes, on the meta device, without weights.

    Its attention is `attention.paged_attention`; the names and shapes of its state_dict are
    those of the checkpoint. On another device its weights are random.

    Raises:
        UnsupportedModelError: the model is not served exactly, or the config makes no sense.
    """
    architecture = check_config(config)
    model_class, config_class = _classes(architecture)
    attention.register()
    try:
        with _quiet():
            parsed = config_class.from_dict(config)
            with torch.device(device):
                model: nn.Module = model_class._from_config(  # noqa: SLF001
                    parsed, attn_implementation=attention.IMPLEMENTATION, dtype=dtype
                )
    except Exception as error:  # whatever transformers' code makes of a senseless config
        raise UnsupportedModelError(
            f"config.json makes no {architecture}: {_line(error)}"
        ) from error
    experts.unfuse(model)
    return model.eval()


def describe(config: dict[str, Any], tensors: Iterable[TensorSlice]) -> ModelDescription:
    """What a model is like, after checking that it would be served exactly.

    Args:
        config: its config.json.
        tensors: names and shapes from the safetensors headers; offsets are not used.

    Raises:
        UnsupportedModelError: it would not be served exactly.
        CheckpointError: a weight is missing, unknown, or of another shape than the config says.
    """
    given = {tensor.name: tensor for tensor in tensors}
    dtype = choose_dtype("auto", given.values())
    model = build_skeleton(config, dtype)
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    for name, shape in wanted.items():
        if name not in given:
            if name not in tied:
                raise CheckpointError(f"tensor {name} is missing")
        elif tuple(given[name].shape) != shape:
            raise CheckpointError(
                f"tensor {name} has shape {list(given[name].shape)}, config.json says {list(shape)}"
            )
    for name in given:
        if name not in wanted and not name.endswith(_IGNORED):
            raise CheckpointError(f"tensor {name} belongs to no part of the model")
    _probe(model)
    parsed: Any = model.config
    return ModelDescription(
        architecture=check_config(config),
        context_tokens=parsed.max_position_embeddings,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        kv_bytes_per_token=KVShape.of(parsed, dtype).bytes_per_token,
    )


def preload(config: dict[str, Any] | None = None) -> None:
    """Imports the modelling code of `config`'s architecture, or of the most common one.

    A config that is not served is ignored: this is a hint.
    """
    names = (config or {}).get("architectures") or ["LlamaForCausalLM"]
    if isinstance(names, list) and names[0] in ARCHITECTURES:
        _classes(names[0])


def _probe(model: nn.Module) -> None:
    """One forward without data: shows an argument that would reach the attention unknown."""
    step = attention.AttentionStep(torch.empty(0), spans=[], write=slice(0, 1))
    ids = torch.zeros(1, 1, dtype=torch.int64, device="meta")
    with torch.inference_mode():
        model(input_ids=ids, position_ids=ids, use_cache=False, flashserve_step=step)


def _classes(architecture: str) -> tuple[Any, Any]:
    """The model's and the configuration's class; imports its modelling code."""
    _, package = ARCHITECTURES[architecture]
    modelling = importlib.import_module(f"transformers.models.{package}.modeling_{package}")
    model_class = getattr(modelling, architecture)
    return model_class, model_class.config_class


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of transformers about configs; what matters is refused, not warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
