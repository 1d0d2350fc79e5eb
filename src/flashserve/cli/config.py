"""`config`: the settings in force, with where they come from resolved and keys masked."""

from __future__ import annotations

from typing import Any

from flashserve.cli import console
from flashserve.cli.options import AsJson
from flashserve.config import load_settings

_MASK = "********"
_SECRET = {"api_keys", "admin_keys", "keys"}


def config(as_json: AsJson = False) -> None:
    """Print every setting in force here: variables over the TOML file over the defaults."""
    settings = masked(load_settings().model_dump(mode="json"))
    if as_json:
        console.print_json(settings)
        return
    rows = [[name, _shown(value)] for name, value in flattened(settings)]
    console.print_table(["setting", "value"], rows, fold=["value"])


def masked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without their secrets; how many keys there are can still be seen."""
    return {
        name: [_MASK] * len(value)
        if name in _SECRET
        else masked(value)
        if isinstance(value, dict)
        else value
        for name, value in settings.items()
    }


def flattened(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every setting, in the order of config.py."""
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            pairs += flattened(value, f"{prefix}{name}.")
        else:
            pairs.append((f"{prefix}{name}", value))
    return pairs


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "-"
    return str(value).lower() if isinstance(value, bool) else str(value)
