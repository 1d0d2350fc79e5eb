"""A worker process inherits the arena and reads from it; it can do no more."""

import errno
import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy

from flashserve.store.dram.arena import EXTENT_ALIGNMENT
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

READER = """
import hashlib, json, mmap, os, sys
from flashserve.store.dram.arena import attach

fd, num_bytes, offset, size = map(int, sys.argv[1:])
mapping = attach(fd, num_bytes)
refused = []
for path in (None, f"/proc/self/fd/{fd}"):
    target = os.open(path, os.O_RDWR) if path else fd
    for attempt in (
        lambda: mmap.mmap(target, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        lambda: os.pwrite(target, b"x", offset),
        lambda: os.ftruncate(target, 0),
    ):
        try:
            attempt()
        except OSError as error:
            refused.append(error.errno)
print(json.dumps([hashlib.sha256(mapping[offset : offset + size]).hexdigest(), refused]))
"""


def test_an_inheriting_process_reads_the_same_bytes_and_cannot_write(tmp_path):
    weights = np.random.default_rng(0).standard_normal((1000, 700)).astype(np.float32)
    safetensors.numpy.save_file({"w": weights}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    store = Store(tmp_path / "data", 8 * EXTENT_ALIGNMENT, prefault=True)
    try:
        model = ModelSpec(ModelId("m"), str(tmp_path), 0)
        store.stage(model, Tier.DRAM)
        with store.lease(model.model_id) as lease:
            fd, size = store.arena.fd, lease.snapshot.size_bytes
            numbers = [str(n) for n in (fd, store.arena.num_bytes, lease.offset, size)]
            done = subprocess.run(
                [sys.executable, "-c", READER, *numbers],
                pass_fds=[fd],
                capture_output=True,
                text=True,
                check=True,
            )
        digest, refused = json.loads(done.stdout)
        data = (tmp_path / "model.safetensors").read_bytes()
        assert digest == hashlib.sha256(data).hexdigest()
        assert refused == [errno.EPERM] * 6
        store.verify(model.model_id)
    finally:
        store.close()
