"""A load needs the checkpoint's own memory, and little beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.integration.store import objectstore
from tests.unit.store.conftest import write_checkpoint

pytestmark = pytest.mark.integration

MIB = 1 << 20
SHARD_BYTES = 64 * MIB
NUM_SHARDS = 3
ALLOWED_BYTES = 256 * MIB

# A fresh process, so that its peak is that of the load alone; the interpreter counts too.
LOAD = """
import json, re, sys
from pathlib import Path
from flashserve.config import StoreSettings
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

source, data_dir, num_bytes = sys.argv[1:]
store = Store(Path(data_dir), int(num_bytes) + (16 << 20), False, StoreSettings())
spec = ModelSpec(ModelId("m"), source, 0, Tier.REMOTE if "://" in source else Tier.DISK)
report = store.stage(spec, Tier.DRAM)
store.verify(spec.model_id)
store.close()
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(json.dumps({"peak": peak, "num_bytes": report.num_bytes}))
"""


@pytest.fixture(scope="module")
def buckets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("buckets")
    files = {
        f"model-0000{number}-of-0000{NUM_SHARDS}.safetensors": {
            f"model.layers.{number}.w": np.full(SHARD_BYTES, number, np.uint8)
        }
        for number in range(1, NUM_SHARDS + 1)
    }
    write_checkpoint(root / "models" / "large", files)
    with (
        pytest.MonkeyPatch.context() as patch,
        objectstore.serving(root, root.with_suffix(".log"), "5m") as endpoint,
    ):
        objectstore.configure(patch, endpoint, root.parent)
        yield root


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_a_load_takes_the_checkpoint_and_256_mib_at_most(
    buckets: Path, kind: str, tmp_path: Path
) -> None:
    directory = buckets / "models" / "large"
    source = str(directory) if kind == "directory" else "s3://models/large"
    num_bytes = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    command = [sys.executable, "-c", LOAD, source, str(tmp_path), str(num_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_bytes"] == num_bytes
    assert num_bytes < found["peak"] < num_bytes + ALLOWED_BYTES
