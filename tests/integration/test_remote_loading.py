"""Models of an object store, in a process of their own and through a node."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.integration.node.nodes import make_settings, running_agent
from tests.integration.store import objectstore
from tests.unit.store.conftest import write_checkpoint

from flashserve import open_snapshot
from flashserve.errors import SourceError

pytestmark = pytest.mark.integration
SOURCE = "s3://models/tiny"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """A server with one small checkpoint; the environment is as a user of it has it."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", objectstore.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", objectstore.SECRET)
    root = tmp_path / "buckets"
    write_checkpoint(root / "models" / "tiny", {"model.safetensors": {"w": np.arange(50_000)}})
    with objectstore.serving(root, tmp_path / "server.log") as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        yield root


def total(source: str, data_dir: Path) -> int:
    with open_snapshot(source, data_dir=data_dir) as tensors:
        return int(tensors["w"].sum())


def test_a_process_alone_reads_it_and_a_missing_one_is_one_line(bucket, tmp_path):
    assert total(SOURCE, tmp_path / "data") == sum(range(50_000))
    with pytest.raises(SourceError, match="nothing") as caught:
        total("s3://models/nothing", tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_a_node_keeps_what_it_fetched_for_others_on_disk_and_not_in_its_arena(bucket, tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with running_agent(settings) as bench:
            await bench.ready(1)
            handout = bench.agent._handout._handout
            assert await asyncio.to_thread(total, SOURCE, settings.data_dir) == sum(range(50_000))
            await bench.until(lambda: not handout.num_clients)
            await bench.until(lambda: bench.agent._store.disk_usage().used > 0)
            await bench.until(lambda: not bench.agent._store.usage().used)  # once it is written

    asyncio.run(check())  # its leak check would take the object store for a worker


def asking(source: str, data_dir: Path) -> subprocess.Popen[bytes]:
    """A process that waits for a model."""
    script = "import sys; from flashserve.loading import _open; _open(*sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", script, source, str(data_dir)])


def test_a_fetch_for_a_process_that_was_killed_stops_and_the_next_one_starts_anew(bucket, tmp_path):
    num_bytes = 48 << 20
    weights = {"model.safetensors": {"w": np.zeros(num_bytes, np.uint8)}}
    write_checkpoint(bucket / "models" / "large", weights)
    source = "s3://models/large"

    async def check() -> None:
        settings = make_settings(tmp_path / "data", arena_bytes=256 << 20)
        store = settings.store.model_copy(update={"remote_bytes_per_s": 24 << 20})
        async with running_agent(settings.model_copy(update={"store": store})) as bench:
            await bench.ready(1)
            handout = bench.agent._handout._handout
            process = asking(source, settings.data_dir)
            try:
                await bench.until(lambda: handout.leases() == {source: 1})
                await bench.until(lambda: bench.agent._store._shelf._fills)
                [fill] = bench.agent._store._shelf._fills
            finally:
                process.kill()
                process.wait()
            await bench.until(lambda: not handout.num_clients)
            await bench.until(lambda: not handout.copied_bytes)
            assert fill.stopping.is_set()
            assert await asyncio.to_thread(total, source, settings.data_dir) == 0
            await bench.until(lambda: not bench.agent._store.usage().used)

    asyncio.run(check())
