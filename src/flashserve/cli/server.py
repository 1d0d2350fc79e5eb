"""The server process: two listening sockets, one application, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import socket
import sys
from collections.abc import Callable, Iterator

import structlog
import uvicorn
import uvloop

from flashserve.cli import console
from flashserve.cli.options import make_data_dir
from flashserve.config import ServerSettings, Settings
from flashserve.errors import InputError
from flashserve.gateway.app import create_app
from flashserve.gateway.auth import check_binding
from flashserve.live.launcher import launch
from flashserve.live.service import Service
from flashserve.node.sockets import bind_unix_socket
from flashserve.telemetry import configure_logging

_BACKLOG = 2048
_LAST_WRITES_S = 5
"""After the drain, answers that are finished may be written to their sockets for so long."""
_log = structlog.get_logger(__name__)


def run_server(settings: Settings) -> None:
    """Serves until a signal. Must be called in the main thread: workers die with their creator.

    Raises:
        InputError: an address cannot be listened on, or must not be without keys.
        ConflictError: another server has this data directory.
    """
    configure_logging(settings.log_level, settings.log_format)
    check_binding(settings)
    with contextlib.ExitStack() as stack:
        make_data_dir(settings.data_dir)
        private = bind_unix_socket(settings.socket_path)
        stack.callback(private.close)
        public = stack.enter_context(_listen(settings.server))
        code = uvloop.run(_serve(settings, public, private.socket))
    sys.exit(code)


def _listen(server: ServerSettings) -> socket.socket:
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        return socket.create_server(address, family=family, backlog=_BACKLOG)
    except OSError as error:
        raise InputError(
            f"cannot listen on {server.host}:{server.port}: {error.strerror or error}; "
            "choose another with --host and --port"
        ) from None


async def _serve(settings: Settings, public: socket.socket, private: socket.socket) -> int:
    """The exit code: 0 after a drain, 128 + the signal's number when a second one cut it short."""
    async with launch(settings) as service:
        config = uvicorn.Config(
            create_app(service, settings),
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_LAST_WRITES_S,
        )
        server = _Server(config, lambda: _announce(settings, public))
        stop = _Stop(service, server, settings.server.grace_period_s)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.on_signal, number)
        gc.collect()
        gc.freeze()  # a full collection of what the libraries made would halt every stream
        await server.serve([public, private])
        return stop.exit_code


class _Server(uvicorn.Server):
    """Uvicorn, which says when it listens, and leaves signals to _Stop."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_listening()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Stop:
    """The first signal drains, while the sockets still answer; the second stops at once."""

    def __init__(self, service: Service, server: uvicorn.Server, grace_s: float) -> None:
        self.exit_code = 0
        self._service = service
        self._server = server
        self._grace_s = grace_s
        self._draining: asyncio.Task[None] | None = None

    def on_signal(self, number: signal.Signals) -> None:
        if self._draining is None:
            _log.info("draining", signal=number.name, grace_s=self._grace_s)
            self._draining = asyncio.create_task(self._drain(), name="drain")
            return
        _log.warning("stopping at once", signal=number.name)
        self.exit_code = 128 + number
        self._draining.cancel()
        self._server.force_exit = True
        self._server.should_exit = True

    async def _drain(self) -> None:
        try:
            await self._service.drain(self._grace_s)
        finally:
            self._server.should_exit = True


def _announce(settings: Settings, public: socket.socket) -> None:
    host, port = public.getsockname()[:2]
    console.print_line(
        f"FlashServe listening on http://{f'[{host}]' if ':' in host else host}:{port} "
        f"({settings.node.num_workers} workers, "
        f"{console.human_bytes(settings.node.dram_bytes)} arena, data in {settings.data_dir})"
    )
