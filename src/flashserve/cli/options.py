"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from flashserve.config import Settings, load_settings, parse_bytes
from flashserve.errors import InputError

Name = Annotated[str, typer.Argument(metavar="NAME", help="The model's name.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Url = Annotated[
    str | None,
    typer.Option(
        envvar="FLASHSERVE_URL",
        help="Server to talk to; without it, the one of this data directory.",
        show_default=False,
    ),
]


_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")


def absolute_source(source: str) -> str:
    """The server has a working directory of its own, so a relative path means nothing to it."""
    return source if _SCHEME.match(source) else str(Path(source).expanduser().absolute())


def settings_for(data_dir: Path | None) -> Settings:
    """The settings in force; data_dir, if given, is stronger than all of them."""
    return load_settings(**({} if data_dir is None else {"data_dir": data_dir}))


def parse_size(size: str) -> int:
    """The bytes that `--size` asks for, at least one; raises InputError for anything else."""
    try:
        num_bytes = int(str(parse_bytes(size)))
    except ValueError:
        raise InputError(f"--size {size} is no size such as 512MiB") from None
    if num_bytes < 1:
        raise InputError(f"--size {size} is less than a byte")
    return num_bytes


def check_page(html: Path) -> None:
    """Says before the work what is known to keep `--html` from being written; raises InputError."""
    if not html.absolute().parent.is_dir():
        raise InputError(f"cannot write {html}: its directory does not exist")
    if html.is_dir():
        raise InputError(f"cannot write {html}: it is a directory")


def make_data_dir(path: Path) -> None:
    """Private, because it holds what was deployed and the socket that needs no key."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the data directory {path}: {error.strerror}") from None
