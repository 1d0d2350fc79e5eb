"""Turns a mapped checkpoint into a transformers model, through transformers' own loader."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GenerationConfig,
    PretrainedConfig,
)
from transformers.utils import logging as transformers_logging

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.messages.handout import HandoutGrant
from flashserve.store.checkpoint.files import one_line, shown
from flashserve.store.device.bind import TORCH_DTYPES
from flashserve.store.handout.mapped import MappedModel
from flashserve.types import TensorSlice

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {
    **TORCH_DTYPES,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}


def build(mapped: MappedModel, name: str, dtype: torch.dtype | str | None) -> PreTrainedModel:
    """The model of a checkpoint; weights that need no conversion stay where they are mapped.

    transformers' loader does the work, so that what it converts, ties, keeps in float32 or fuses
    is here as it is there; it is given tensors instead of files.

    Args:
        mapped: the checkpoint.
        name: what the model is to say it came from; others find its tokenizer there.
        dtype: as transformers takes it; None is "auto".

    Raises:
        CheckpointError: the checkpoint lacks a weight, or has one of another shape.
        UnsupportedModelError: transformers cannot build the model.
    """
    grant = mapped.grant
    try:
        config = _parse(grant.config)
        model_class, config = _model_class(config)
        with _no_progress_bar():
            model, report = model_class.from_pretrained(
                None,
                config=config,
                state_dict={entry.name: as_tensor(entry, mapped.memory) for entry in grant.tensors},
                dtype="auto" if dtype is None else dtype,
                output_loading_info=True,
            )
        if model.can_generate():
            model.generation_config = _generation_config(grant)
    except (CheckpointError, UnsupportedModelError, MemoryError):
        raise
    except Exception as error:  # whatever transformers' code makes of what is no model
        raise UnsupportedModelError(
            f"transformers cannot build the model of {grant.uri}: {one_line(error)}"
        ) from error
    if missing := sorted(report["missing_keys"]):
        raise CheckpointError(
            f"{grant.uri} lacks tensor {shown(missing[0])}, which its config needs"
        )
    model.config.name_or_path = model.name_or_path = name
    ready: PreTrainedModel = model
    return ready


def as_tensor(entry: TensorSlice, memory: mmap.mmap) -> torch.Tensor:
    """A view of the tensor's bytes, which keeps `memory`; a copy where they are not aligned.

    Every view has a storage of its own, so that nothing that walks storages (saving, copying,
    finding shared weights) sees the whole checkpoint.

    Raises:
        CheckpointError: the bytes do not lie in the memory.
        UnsupportedModelError: torch has no such type.
    """
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise UnsupportedModelError(f"tensor {shown(entry.name)} has type {entry.dtype}")
    count, begin, end = math.prod(entry.shape), entry.offset, entry.offset + entry.num_bytes
    if begin < 0 or end > len(memory) or count * dtype.itemsize != entry.num_bytes:
        raise CheckpointError(f"tensor {shown(entry.name)} does not lie at bytes {begin} to {end}")
    if count == 0:
        return torch.empty(entry.shape, dtype=dtype)
    if begin % dtype.itemsize:
        return torch.frombuffer(bytearray(memory[begin:end]), dtype=dtype).view(entry.shape)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=begin).view(entry.shape)


@contextlib.contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Transformers shows one for weights that are there already."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


def _parse(config: dict[str, Any]) -> PretrainedConfig:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"config.json: transformers knows no model_type {shown(model_type)}"
        )
    parsed: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(config)
    return parsed


def _model_class(config: PretrainedConfig) -> tuple[Any, PretrainedConfig]:
    """The class that AutoModelForCausalLM would take, and the config that it would be given."""
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(
            f"config.json: a model of type {config.model_type} does not continue text"
        )
    found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    classes = list(found) if isinstance(found, (list, tuple)) else [found]
    wanted = getattr(config, "architectures", None) or []
    model_class = next((each for each in classes if each.__name__ in wanted), classes[0])
    text_class = config.sub_configs.get("text_config")
    if text_class is not None and model_class.config_class is text_class:
        config = config.get_text_config()  # of a model with more senses, only its text
    return model_class, config


def _generation_config(grant: HandoutGrant) -> GenerationConfig:
    """What generation_config.json says, else what config.json does."""
    parsed: GenerationConfig
    if grant.generation_config:
        parsed = GenerationConfig.from_dict(dict(grant.generation_config))
        # As loaded from a file: a published one that is not quite valid may be saved again.
        parsed._original_object_hash = hash(parsed)  # noqa: SLF001
    else:
        parsed = GenerationConfig.from_model_config(dict(grant.config))
    return parsed
