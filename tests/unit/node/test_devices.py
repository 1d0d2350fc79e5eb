from __future__ import annotations

import os
from pathlib import Path

import pytest

from flashserve.config import NodeSettings
from flashserve.node import devices

CORES = len(os.sched_getaffinity(0))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Its device files, none yet, and a torch that was built for CUDA."""
    monkeypatch.setattr(devices, "_DEVICES", tmp_path)
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda _: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_workers_share_the_cores_of_a_machine_without_an_accelerator(machine: Path) -> None:
    (machine / "nvidiactl").touch()
    assert devices.worker_cores(NodeSettings(num_workers=1)) == CORES
    assert devices.worker_cores(NodeSettings(num_workers=4)) == CORES / 4
    assert devices.worker_cores(NodeSettings(num_workers=1, threads_per_worker=1)) == 1
    assert devices.worker_cores(NodeSettings(num_workers=1, threads_per_worker=999)) == CORES


@pytest.mark.parametrize("name", ["nvidia0", "nvidia7", "dxg"])
def test_an_accelerator_is_found_by_its_device_file(machine: Path, name: str) -> None:
    (machine / name).touch()
    assert devices.worker_cores(NodeSettings()) is None
    assert devices.worker_cores(NodeSettings(device="cpu")) is not None


def test_an_accelerator_that_workers_cannot_use_is_none(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "nvidia0").touch()
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda _: "2.13.0+cpu")
    assert devices.worker_cores(NodeSettings()) is not None
    monkeypatch.setattr(devices.importlib.metadata, "version", lambda _: "2.13.0+cu130")
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert devices.worker_cores(NodeSettings()) is not None
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert devices.worker_cores(NodeSettings()) is None


def test_who_asks_for_cuda_pays_for_it(machine: Path) -> None:
    assert devices.worker_cores(NodeSettings(device="cuda")) is None
