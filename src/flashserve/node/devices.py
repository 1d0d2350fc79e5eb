"""What a machine's workers compute on, as far as that shows without loading the tensor library."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

from flashserve.config import NodeSettings

_DEVICES = pathlib.Path("/dev")
_NO_DEVICE = ("", "-1")
"""Values of CUDA_VISIBLE_DEVICES that hide them all."""


def worker_cores(settings: NodeSettings) -> float | None:
    """Cores that each worker has for itself; None where workers compute on accelerators."""
    if settings.device == "cuda" or (settings.device == "auto" and _finds_accelerator(_DEVICES)):
        return None
    cores = len(os.sched_getaffinity(0))
    share = cores / settings.num_workers
    return min(share, settings.threads_per_worker or cores)


def _finds_accelerator(devices: pathlib.Path) -> bool:
    """Whether there is a CUDA device, visible, and a build of torch that can use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all").strip() in _NO_DEVICE:
        return False
    has_device = any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()  # dxg: on WSL
    return has_device and not importlib.metadata.version("torch").endswith("+cpu")
