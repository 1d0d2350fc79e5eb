"""What a directory says about a model, read and checked without loading a byte of its weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.dram import extent_bytes
from flashserve.store.files import one_line, open_file, read_json
from flashserve.store.layout import Layout, read_layout
from flashserve.store.source import Source

_MAX_TEMPLATE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that a replica needs besides the bytes of the weights.

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
        return extent_bytes(self.layout.image_bytes)


def read_snapshot(source: Source) -> Snapshot:
    """Reads and checks config, layout and what belongs to the tokenizer.

    Raises:
        SourceError: the source is missing or cannot be read.
        CheckpointError: a file is damaged or missing; one line that names it.
        UnsupportedModelError: the model needs Python code of its own.
    """
    directory = source.directory()
    identity = source.identity()
    config = read_json(directory, "config.json")
    if config is None:
        raise CheckpointError(f"{directory / 'config.json'} is missing")
    if "auto_map" in config:
        raise UnsupportedModelError(
            f"{directory / 'config.json'} asks for Python code of the checkpoint (auto_map), which "
            "is never run"
        )
    return Snapshot(
        uri=source.uri,
        identity=identity,
        directory=directory,
        config=config,
        generation_config=read_json(directory, "generation_config.json") or {},
        layout=read_layout(directory),
        has_tokenizer=(directory / "tokenizer.json").is_file(),
        chat_template=_read_chat_template(directory),
    )


def _read_chat_template(directory: Path) -> str | None:
    """From chat_template.jinja, else from tokenizer_config.json (a string, or several by name)."""
    try:
        with open_file(directory, "chat_template.jinja") as file:
            data = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(data) > _MAX_TEMPLATE_BYTES:
            raise CheckpointError(
                f"{directory / 'chat_template.jinja'} is larger than {_MAX_TEMPLATE_BYTES} bytes"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        template = (read_json(directory, "tokenizer_config.json") or {}).get("chat_template")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{directory / 'chat_template.jinja'} cannot be read: {one_line(error)}"
        ) from None
    if isinstance(template, list):
        objects = [each for each in template if isinstance(each, dict)]
        defaults = [each.get("template") for each in objects if each.get("name") == "default"]
        template = defaults[0] if defaults else None
    return template if isinstance(template, str) else None
