"""FlashServe: serverless serving of many large language models on few accelerators."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashserve.loading import load_model, open_snapshot

__version__ = "0.1.0"
__all__ = ["__version__", "load_model", "open_snapshot"]


def __getattr__(name: str) -> Any:
    """What users import from here, found when it is asked for: `import flashserve` stays light."""
    if name in {"load_model", "open_snapshot"}:
        return getattr(importlib.import_module("flashserve.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
