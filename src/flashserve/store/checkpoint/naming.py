"""Which of a place's files are a checkpoint's: a model's, or a LoRA adapter's, which PEFT names."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

import msgspec

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.files import (
    MAX_FILES,
    CheckpointFiles,
    is_plain,
    is_small,
    one_line,
    read_json,
    shown,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER_NAME = "adapter_model.safetensors"
ADAPTER_INDEX_NAME = "adapter_model.safetensors.index.json"
ADAPTER_CONFIG_NAME = "adapter_config.json"
MAX_INDEX_BYTES = 32 << 20

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True, slots=True)
class WeightFiles:
    """Their names, sorted; which of them the index has each tensor in; and the index's name."""

    names: tuple[str, ...]
    placed: dict[str, str]
    index_name: str


def is_model(names: Collection[str]) -> bool:
    """Whether a model's weights are among files of these names."""
    return SINGLE_NAME in names or INDEX_NAME in names


def is_adapter(names: Collection[str]) -> bool:
    """Whether files of these names are those of a LoRA adapter, and of no model."""
    return ADAPTER_CONFIG_NAME in names and not is_model(names)


def small_names(names: Collection[str]) -> tuple[str, ...]:
    """Those of the names that belong to the checkpoint besides its weights.

    Of an adapter that is its configuration: a tokenizer beside it is its base's.
    """
    if is_adapter(names):
        return tuple(name for name in (ADAPTER_CONFIG_NAME, ADAPTER_INDEX_NAME) if name in names)
    return tuple(filter(is_small, names))


def find_weights(files: CheckpointFiles) -> WeightFiles:
    """The weight files: the single one, or those that the index names.

    Raises:
        CheckpointError: there are none that can be loaded, or the index is none.
        SourceError: a file cannot be had.
    """
    names = files.names()
    single, index = SINGLE_NAME, INDEX_NAME
    if is_adapter(names):
        single, index = ADAPTER_NAME, ADAPTER_INDEX_NAME
    if single in names:
        return WeightFiles((single,), {}, index)
    if index in names:
        placed = _read_index(files, index)
        return WeightFiles(tuple(sorted(set(placed.values()))), placed, index)
    if ADAPTER_NAME in names:
        raise CheckpointError(f"{files.place} holds {ADAPTER_NAME} but no {ADAPTER_CONFIG_NAME}")
    pickles = [name for name in names if name.endswith(_PICKLES)]
    if pickles:
        raise CheckpointError(
            f"{files.place} holds only pickled weights ({shown(pickles[0])}), which can run code "
            "and are never loaded: convert them to safetensors"
        )
    model_or_adapter = "" if is_adapter(names) else f", nor an {ADAPTER_CONFIG_NAME}"
    raise CheckpointError(f"{files.place} holds neither {single} nor {index}{model_or_adapter}")


def _read_index(files: CheckpointFiles, index_name: str) -> dict[str, str]:
    """Tensor name to file name."""
    path = f"{files.place}/{index_name}"
    index = read_json(files, index_name, MAX_INDEX_BYTES) or {}
    try:
        placed = msgspec.convert(index.get("weight_map"), dict[str, str])
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} has no valid weight_map: {one_line(error)}") from None
    if not placed:
        raise CheckpointError(f"{path} lists no tensor")
    names = set(placed.values())
    for name in sorted(names):
        if not (name.endswith(".safetensors") and is_plain(name)):
            raise CheckpointError(f"{path} names {shown(name)}, which is no shard of the directory")
    if len(names) > MAX_FILES:
        raise CheckpointError(f"{path} names {len(names)} shards; at most {MAX_FILES} are read")
    return placed
