"""Models and their tensors in any process: from the node of this machine, or read directly.

Needs no tensor library by itself; `load_model` imports torch and transformers when it is called.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from flashserve.config import load_settings
from flashserve.errors import SourceError
from flashserve.opened import OpenTensors, RawTensor
from flashserve.store.checkpoint.files import shown
from flashserve.store.handout.client import fetch, socket_path
from flashserve.store.handout.copies import read_copy, reading_store
from flashserve.store.handout.mapped import MappedModel
from flashserve.store.sources.source import scheme_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(
    source: str | os.PathLike[str],
    *,
    data_dir: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | str | None = None,
) -> PreTrainedModel:
    """A ready transformers model, as `AutoModelForCausalLM.from_pretrained` would return it.

    The running node of `data_dir` gives it out of its memory; without one, the checkpoint is read
    here. Parameters are this process's view of shared pages: writing to one copies its pages and
    is seen by nobody else. The node keeps the memory as long as any tensor lives.

    Args:
        source: a directory, `demo:smollm2`, `s3://...`, `hf://...`, or the name of a model that
            is deployed on the running node. A directory of that name comes first.
        data_dir: the node's; None follows FLASHSERVE_DATA_DIR and the default, as the server does.
        dtype: what floating-point weights are converted to, which copies them; None keeps the
            checkpoint's own.

    Raises:
        SourceError: the source is missing or cannot be read.
        CheckpointError: a file of it is damaged, or lacks a weight.
        UnsupportedModelError: transformers cannot build the model.
        UnavailableError: there is no memory for it now.
    """
    # Takes seconds in a new process, in which the bytes can come. They are waited for here, because
    # this thread can be interrupted.
    threading.Thread(target=_import_builder, name="load-model-import").start()
    mapped = _open(source, data_dir)
    from flashserve.pretrained import build

    name = os.fspath(source)
    return build(mapped, name if _is_directory(name) else mapped.grant.directory, dtype)


@contextlib.contextmanager
def open_snapshot(
    source: str | os.PathLike[str], *, data_dir: str | os.PathLike[str] | None = None
) -> Iterator[Mapping[str, npt.NDArray[Any] | RawTensor]]:
    """The tensors of a checkpoint by name, for any framework; source and data_dir as above.

    Each is a read-only array over the shared memory, or a RawTensor where numpy has no such type
    (BF16, F8_E4M3, ...). Leaving the context gives the memory back to the node; arrays that were
    taken out stay readable, and asking for more is a ConflictError.

    Raises:
        FlashServeError: as `load_model`.
    """
    tensors = OpenTensors(_open(source, data_dir))
    try:
        yield tensors
    finally:
        tensors.close()


def _open(source: str | os.PathLike[str], data_dir: str | os.PathLike[str] | None) -> MappedModel:
    overrides = {} if data_dir is None else {"data_dir": Path(data_dir)}
    settings = load_settings(**overrides)
    name = os.fspath(source)
    is_directory = _is_directory(name)
    uri = str(Path(name).absolute()) if is_directory else name
    if handed := fetch(socket_path(settings.data_dir), uri):
        return MappedModel(*handed)
    if not is_directory and scheme_of(name) is None:
        raise SourceError(
            f"source {shown(name)} is no directory, and no node runs in {settings.data_dir} that "
            "could have a model of that name"
        )
    store = reading_store(settings.data_dir, settings.store)
    try:
        copy = read_copy(store, uri)
    finally:
        store.close()
    return MappedModel(copy, None)


def _import_builder() -> None:
    with contextlib.suppress(ImportError):  # whoever needs it says so
        import flashserve.pretrained  # noqa: F401


def _is_directory(name: str) -> bool:
    return bool(name) and scheme_of(name) is None and Path(name).is_dir()
