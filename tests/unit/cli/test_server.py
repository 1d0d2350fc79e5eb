from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import types

import pytest

from flashserve.cli.server import _Stop, run_server
from flashserve.config import AuthSettings, ServerSettings, Settings
from flashserve.errors import InputError


class FakeService:
    """Drains when it is told that the last stream has ended."""

    def __init__(self) -> None:
        self.graces: list[float] = []
        self.streams_ended = asyncio.Event()
        self.was_cut_short = False

    async def drain(self, grace_s: float) -> None:
        self.graces.append(grace_s)
        try:
            await self.streams_ended.wait()
        except asyncio.CancelledError:
            self.was_cut_short = True
            raise


def fake_server() -> types.SimpleNamespace:
    return types.SimpleNamespace(should_exit=False, force_exit=False)


async def let_tasks_run() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_the_first_signal_drains_and_the_server_answers_until_that_is_done() -> None:
    async def scenario() -> None:
        service, server = FakeService(), fake_server()
        stop = _Stop(service, server, 30.0)
        stop.on_signal(signal.SIGTERM)
        await let_tasks_run()
        assert service.graces == [30.0]
        assert not server.should_exit
        service.streams_ended.set()
        await let_tasks_run()
        assert server.should_exit
        assert not server.force_exit
        assert stop.exit_code == 0

    asyncio.run(scenario())


def test_the_second_signal_stops_at_once() -> None:
    async def scenario() -> None:
        service, server = FakeService(), fake_server()
        stop = _Stop(service, server, 30.0)
        stop.on_signal(signal.SIGTERM)
        await let_tasks_run()
        stop.on_signal(signal.SIGINT)
        await let_tasks_run()
        assert server.should_exit
        assert server.force_exit
        assert service.was_cut_short
        assert stop.exit_code == 130

    asyncio.run(scenario())


def test_an_open_address_without_keys_is_refused_before_anything_is_made(tmp_path) -> None:
    settings = Settings(data_dir=tmp_path / "data", server=ServerSettings(host="0.0.0.0"))
    assert settings.auth == AuthSettings()
    with pytest.raises(InputError, match="api_keys"):
        run_server(settings)
    assert not settings.data_dir.exists()


def test_the_server_process_does_not_import_the_tensor_library() -> None:
    code = (
        "import sys, flashserve.cli.server\n"
        "print(*sorted({'torch', 'transformers', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
