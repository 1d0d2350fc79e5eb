"""What a checkpoint says about a model, read and checked without loading a byte of its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.checkpoint.files import CheckpointFiles, one_line, read_json
from flashserve.store.checkpoint.layout import Layout, read_layout
from flashserve.store.checkpoint.naming import is_adapter
from flashserve.store.dram.arena import extent_bytes

_MAX_TEMPLATE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a replica needs besides the bytes of the weights.

    directory is on this machine and has config and tokenizer files, and perhaps the weights.
    chat_template is Jinja source, None where the checkpoint has none. has_tokenizer says whether
    there is a tokenizer.json.
    """

    uri: str
    identity: str
    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    layout: Layout
    has_tokenizer: bool
    chat_template: str | None

    @property
    def size_bytes(self) -> int:
        """Bytes of the weight files."""
        return self.layout.size_bytes

    @property
    def arena_bytes(self) -> int:
        """Bytes that the weights take of a DRAM arena."""
        return sum(extent_bytes(file.num_bytes) for file in self.layout.files)


def read_snapshot(files: CheckpointFiles, uri: str, identity: str) -> Snapshot:
    """Reads and checks config, layout and what belongs to the tokenizer.

    Args:
        files: of the checkpoint.
        uri: as it was deployed.
        identity: of the listing to which the files belong.

    Raises:
        SourceError: a file cannot be had.
        CheckpointError: a file is damaged or missing; one line that names it.
        UnsupportedModelError: the model needs Python code of its own.
    """
    names = files.names()
    if is_adapter(names):
        raise CheckpointError(
            f"{files.place} holds a LoRA adapter, not a model: flashserve adapter add BASE NAME "
            "SOURCE"
        )
    config = read_json(files, "config.json")
    if config is None:
        raise CheckpointError(f"{files.place}/config.json is missing")
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{files.place}/config.json asks for Python code of the checkpoint (auto_map), which "
            "is never run"
        )
    return Snapshot(
        uri=uri,
        identity=identity,
        directory=files.directory,
        config=config,
        generation_config=read_json(files, "generation_config.json") or {},
        layout=read_layout(files),
        has_tokenizer="tokenizer.json" in names,
        chat_template=_read_chat_template(files),
    )


def _read_chat_template(files: CheckpointFiles) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json (a string, or several by name)."""
    path = f"{files.place}/chat_template.jinja"
    try:
        file, num_bytes = files.open("chat_template.jinja")
        with file:
            if num_bytes > _MAX_TEMPLATE_BYTES:
                raise CheckpointError(f"{path} is larger than {_MAX_TEMPLATE_BYTES} bytes")
            return file.read(_MAX_TEMPLATE_BYTES).decode("utf-8")
    except FileNotFoundError:
        template = (read_json(files, "tokenizer_config.json") or {}).get("chat_template")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from None
    if isinstance(template, list):
        objects = [each for each in template if isinstance(each, dict)]
        defaults = [each.get("template") for each in objects if each.get("name") == "default"]
        template = defaults[0] if defaults else None
    return template if isinstance(template, str) else None
