"""Other processes get a node's models: copied once, leased by their connection, never the arena."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import mmap
import os
import pathlib
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from tests.integration.node.nodes import (
    MIB,
    TIMEOUT_S,
    Bench,
    fake_model,
    make_settings,
    run,
    running_agent,
)

from flashserve import open_snapshot
from flashserve.config import Settings
from flashserve.errors import FlashServeError, ModelTooLargeError, SourceError, UnavailableError
from flashserve.messages import wire
from flashserve.messages.events import Evicted, Staged
from flashserve.messages.handout import MAX_REQUEST_BYTES
from flashserve.store.handout.client import fetch, socket_path
from flashserve.store.handout.server import Handout
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

CLIENT = """
import sys
from flashserve import open_snapshot

with open_snapshot(sys.argv[1], data_dir=sys.argv[2]) as tensors:
    tensor = tensors["weight"]
    print(int(tensor.sum()), flush=True)
    sys.stdin.readline()
    print(int(tensor.sum()), flush=True)
"""


def make_model(directory: pathlib.Path, name: str, value: int = 1) -> ModelSpec:
    """100 000 bytes of `value`."""
    spec = fake_model(directory, name)
    weights = {"weight": np.full(100_000, value, np.uint8)}
    safetensors.numpy.save_file(weights, pathlib.Path(spec.source) / "model.safetensors")
    return spec


def with_store(settings: Settings, **store: Any) -> Settings:
    return settings.model_copy(update={"store": settings.store.model_copy(update=store)})


@contextlib.asynccontextmanager
async def node(settings: Settings, keep_s: float = 0.0) -> AsyncIterator[tuple[Bench, Handout]]:
    async with running_agent(with_store(settings, handout_keep_s=keep_s)) as bench:
        yield bench, bench.agent._handout._handout


async def opened(source: str, data_dir: pathlib.Path) -> int:
    """The sum of the weights, read in a thread while the node goes on."""

    def read() -> int:
        with open_snapshot(source, data_dir=data_dir) as tensors:
            return int(tensors["weight"].sum())

    return await asyncio.to_thread(read)


class Client:
    """A process that holds a model until it is told to go on, or killed."""

    def __init__(self, source: str, data_dir: pathlib.Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT, source, str(data_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    async def line(self) -> str:
        return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    async def end(self) -> int:
        with self.process:
            output, _ = await asyncio.to_thread(self.process.communicate, "\n")
        return int(output)

    def kill(self) -> None:
        self.process.kill()
        with self.process:
            self.process.wait()


def test_a_process_gets_a_model_by_name_or_directory_whether_or_not_it_is_in_dram(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (bench, handout):
            staged, cold = make_model(tmp_path, "staged", 1), make_model(tmp_path, "cold", 2)
            bench.agent.deployed = lambda: {cold.model_id: cold}
            bench.stage(staged)
            await bench.events.next(Staged, model_id=staged.model_id)
            for source, total in [
                ("staged", 100_000),
                (staged.source, 100_000),
                ("cold", 200_000),
                (cold.source, 200_000),
            ]:
                assert await opened(source, settings.data_dir) == total
            await bench.until(lambda: not handout.num_clients)
            assert handout.copied_bytes == 0
            usage = bench.agent._store.usage()
            assert usage.used == 2 * MIB  # of the staged model alone
            assert bench.num_leases() == 0

    run(check())


def test_concurrent_clients_share_one_copy_and_a_killed_one_gives_up_its_lease(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (bench, handout):
            model = make_model(tmp_path, "m")
            clients = [Client(model.source, settings.data_dir) for _ in range(3)]
            try:
                assert [await client.line() for client in clients] == ["100000"] * 3
                assert handout.num_clients == 3
                assert handout.copied_bytes == 2 * MIB
                clients[0].kill()
                await bench.until(lambda: handout.num_clients == 2)
                assert handout.copied_bytes == 2 * MIB
                assert [await client.end() for client in clients[1:]] == [100_000] * 2
                await bench.until(lambda: not handout.num_clients)
                assert handout.copied_bytes == 0
            finally:
                for client in clients:
                    client.kill()

    run(check())


def test_eight_threads_that_ask_at_once_share_one_copy(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (_, handout):
            model = make_model(tmp_path, "m")
            path = socket_path(settings.data_dir)
            got = await asyncio.gather(
                *(asyncio.to_thread(fetch, path, model.source) for _ in range(8))
            )
            assert handout.copied_bytes == 2 * MIB
            inodes = set()
            for copy, sock in got:
                inodes.add(os.fstat(copy.fd).st_ino)
                copy.close()
                sock.close()
            assert len(inodes) == 1

    run(check())


def test_a_client_cannot_write_what_it_got_nor_reach_other_models(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (bench, _):
            models = [make_model(tmp_path, name, value) for name, value in (("a", 7), ("b", 9))]
            for model in models:
                bench.stage(model)
                await bench.events.next(Staged, model_id=model.model_id)
            copy, sock = await asyncio.to_thread(fetch, socket_path(settings.data_dir), "a")
            with sock:
                refused = []
                again = os.open(f"/proc/self/fd/{copy.fd}", os.O_RDWR)
                for fd in (copy.fd, again):
                    for attempt in (
                        lambda fd=fd: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE),
                        lambda fd=fd: os.pwrite(fd, b"x", 0),
                        lambda fd=fd: os.ftruncate(fd, 0),
                    ):
                        with pytest.raises(OSError, match="not permitted") as caught:
                            attempt()
                        refused.append(caught.value.errno)
                assert refused == [errno.EPERM] * 6
                assert os.fstat(copy.fd).st_ino != os.fstat(bench.agent._store.arena.fd).st_ino
                data = os.pread(copy.fd, 8 * MIB, 0)
                assert bytes([7]) * 100 in data
                assert bytes([9]) * 100 not in data
            os.close(again)
            copy.close()

    run(check())


def test_the_bytes_outlive_the_node_and_a_later_one_takes_its_place(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        model = make_model(tmp_path, "m")
        async with node(settings):
            client = Client(model.source, settings.data_dir)
            assert await client.line() == "100000"
        assert await client.end() == 100_000
        async with node(settings):
            assert await opened(model.source, settings.data_dir) == 100_000

    run(check())


def test_a_node_that_was_killed_is_no_node(tmp_path):
    path = socket_path(tmp_path)
    path.parent.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert fetch(path, "anything") is None
    model = make_model(tmp_path, "m")
    with open_snapshot(model.source, data_dir=tmp_path) as tensors:
        assert int(tensors["weight"].sum()) == 100_000


def test_the_socket_is_private(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings):
            path = socket_path(settings.data_dir)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert not path.exists()

    run(check())


def test_what_cannot_be_had_is_one_line(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (_, handout):
            for source in ("unknown", str(tmp_path / "nowhere"), "ftp://host/x", ""):
                with pytest.raises(SourceError) as caught:
                    await opened(source, settings.data_dir)
                assert "\n" not in str(caught.value)
            broken = make_model(tmp_path, "broken")
            (pathlib.Path(broken.source) / "model.safetensors").write_bytes(b"\xff" * 100)
            with pytest.raises(FlashServeError, match=r"model\.safetensors"):
                await opened(broken.source, settings.data_dir)
            assert handout.copied_bytes == 0

    run(check())


def test_memory_for_copies_is_bounded(tmp_path):
    async def check() -> None:
        settings = with_store(make_settings(tmp_path / "data"), handout_bytes=3 * MIB)
        async with node(settings) as (bench, handout):
            first, second = make_model(tmp_path, "a"), make_model(tmp_path, "b")
            huge = fake_model(tmp_path, "huge", 5 * MIB)
            path = socket_path(settings.data_dir)
            with pytest.raises(ModelTooLargeError, match=rf"{6 * MIB}.*{3 * MIB}"):
                await asyncio.to_thread(fetch, path, huge.source)
            copy, sock = await asyncio.to_thread(fetch, path, first.source)
            with pytest.raises(UnavailableError, match=rf"{2 * MIB}.*{2 * MIB} of {3 * MIB}"):
                await asyncio.to_thread(fetch, path, second.source)
            copy.close()
            sock.close()
            await bench.until(lambda: not handout.copied_bytes)
            assert await opened(second.source, settings.data_dir) == 100_000

    run(check())


async def inode(source: str, data_dir: pathlib.Path) -> int:
    """Which memory somebody gets who takes a model and leaves again."""
    copy, sock = await asyncio.to_thread(fetch, socket_path(data_dir), source)
    with sock:
        number = os.fstat(copy.fd).st_ino
        copy.close()
    return number


def test_a_copy_that_nobody_holds_is_there_for_the_next_until_others_need_its_room(tmp_path):
    async def check() -> None:
        settings = with_store(make_settings(tmp_path / "data"), handout_bytes=5 * MIB)
        models = [make_model(tmp_path, name, value) for value, name in enumerate("abc", 1)]
        async with node(settings, keep_s=3600.0) as (bench, handout):

            async def take(model: ModelSpec) -> int:
                number = await inode(model.source, settings.data_dir)
                await bench.until(lambda: not handout.num_clients)
                return number

            first, second = await take(models[0]), await take(models[1])
            assert (await take(models[0]), await take(models[1])) == (first, second)
            await take(models[0])  # so that b is the one that has waited longest
            assert handout.copied_bytes == 4 * MIB
            await take(models[2])
            assert handout.copied_bytes == 4 * MIB
            assert await take(models[0]) == first
            assert await take(models[1]) != second
            assert not any(handout.leases().values())

    run(check())


def test_a_copy_that_nobody_holds_goes_after_a_while(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings, keep_s=0.001) as (bench, handout):
            await inode(make_model(tmp_path, "m").source, settings.data_dir)
            await bench.until(lambda: not handout.copied_bytes)

    run(check())


def test_a_source_that_changed_is_not_answered_with_the_copy_of_before(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings, keep_s=3600.0):
            model = make_model(tmp_path, "m")
            assert await opened(model.source, settings.data_dir) == 100_000
            weights = {"weight": np.full(100_000, 2, np.uint8)}
            safetensors.numpy.save_file(weights, pathlib.Path(model.source) / "model.safetensors")
            assert await opened(model.source, settings.data_dir) == 200_000

    run(check())


RATE_BYTES_PER_S = 16 * MIB


def slow_node(data_dir: pathlib.Path) -> Settings:
    settings = make_settings(data_dir, arena_bytes=2048 * MIB)  # of which little is touched
    return with_store(settings, disk_bytes_per_s=RATE_BYTES_PER_S, disk_threads=2)


def hollow_model(directory: pathlib.Path, num_bytes: int) -> ModelSpec:
    """Zeros that take no room on disk."""
    spec = fake_model(directory, "hollow")
    header = {"weight": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    encoded = json.dumps(header).encode()
    with (pathlib.Path(spec.source) / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + num_bytes)
    return spec


def reading_threads() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith(("store-read", "store-fill"))]


def test_a_read_for_a_process_that_was_killed_stops_and_gives_its_memory_back(tmp_path):
    async def check() -> None:
        settings = slow_node(tmp_path / "data")
        model = hollow_model(tmp_path, int(RATE_BYTES_PER_S * 2 * TIMEOUT_S))  # it would go on
        async with node(settings) as (bench, handout):
            client = Client(model.source, settings.data_dir)
            try:
                await bench.until(lambda: len(reading_threads()) > 1)
                assert handout.leases() == {model.source: 1}
            finally:
                client.kill()
            await bench.until(lambda: not handout.num_clients)
            await bench.until(lambda: not handout.copied_bytes)
            assert not reading_threads()

    run(check())


def test_a_read_goes_on_when_one_of_two_who_wait_for_it_leaves(tmp_path):
    async def check() -> None:
        settings = slow_node(tmp_path / "data")
        model = hollow_model(tmp_path, RATE_BYTES_PER_S)
        async with node(settings) as (bench, handout):
            clients = [Client(model.source, settings.data_dir) for _ in range(2)]
            try:
                await bench.until(lambda: handout.leases() == {model.source: 2})
                clients[0].kill()
                assert await clients[1].line() == "0"
                assert handout.leases() == {model.source: 1}
                assert await clients[1].end() == 0
            finally:
                for client in clients:
                    client.kill()

    run(check())


def test_stats_count_who_holds_a_model_and_evicting_it_leaves_them_theirs(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (bench, handout):
            staged, cold = make_model(tmp_path, "staged", 1), make_model(tmp_path, "cold", 2)
            bench.agent.deployed = lambda: {cold.model_id: cold}
            bench.stage(staged)
            await bench.events.next(Staged, model_id=staged.model_id)

            async def leases() -> dict[str, int]:
                stats = await bench.agent.stats()
                return {name: residence.num_leases for name, residence in stats.models.items()}

            assert await leases() == {"staged": 0}
            clients = [Client(source, settings.data_dir) for source in ("staged", "cold")]
            try:
                assert [await client.line() for client in clients] == ["100000", "200000"]
                assert await leases() == {"staged": 1, "cold": 1}
                bench.evict(staged)
                await bench.events.next(Evicted, model_id=staged.model_id)
                assert bench.agent._store.usage().used == 0
                assert [await client.end() for client in clients] == [100_000, 200_000]
                await bench.until(lambda: not handout.num_clients)
            finally:
                for client in clients:
                    client.kill()

    run(check())


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\x00\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00\x00\x04abcd",
        wire.encode(wire.Call(1, "load")),
        wire.encode(wire.Call(1, "hand_out", wire.pack({"source": 5}))),
        b"\x00\x10\x00\x00" + b"x" * (MAX_REQUEST_BYTES + 1),
    ],
    ids=["nothing", "part", "http", "no-frame", "other-method", "other-type", "too-long"],
)
def test_garbage_ends_its_own_connection_only(request_bytes, tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings) as (bench, handout):
            with socket.socket(socket.AF_UNIX) as hostile:
                hostile.connect(str(socket_path(settings.data_dir)))
                with contextlib.suppress(BrokenPipeError):
                    await asyncio.to_thread(hostile.sendall, request_bytes)
                hostile.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):
                    assert await asyncio.to_thread(hostile.recv, 100) == b""
            await bench.until(lambda: not handout.num_clients)
            model = make_model(tmp_path, "m")
            assert await opened(model.source, settings.data_dir) == 100_000

    run(check())


def test_a_client_that_asks_for_nothing_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr("flashserve.store.handout.server._REQUEST_TIMEOUT_S", 0.01)

    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings):
            with socket.socket(socket.AF_UNIX) as silent:
                silent.connect(str(socket_path(settings.data_dir)))
                assert await asyncio.to_thread(silent.recv, 100) == b""

    run(check())


def test_a_process_of_another_user_gets_nothing(tmp_path, monkeypatch):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        async with node(settings):
            model = make_model(tmp_path, "m")
            monkeypatch.setattr(
                "flashserve.store.handout.server.os.getuid", lambda: os.geteuid() + 1
            )
            with pytest.raises(UnavailableError):
                await asyncio.to_thread(fetch, socket_path(settings.data_dir), model.source)

    run(check())


def test_a_second_node_of_a_data_directory_serves_without_handing_out(tmp_path):
    async def check() -> None:
        settings = make_settings(tmp_path / "data")
        model = make_model(tmp_path, "m")
        async with node(settings):
            async with running_agent(settings) as second:
                second.stage(model)
                await second.events.next(Staged, model_id=ModelId("m"), tier=Tier.DRAM)
            assert await opened(model.source, settings.data_dir) == 100_000

    run(check())
