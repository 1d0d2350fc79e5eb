"""Puts a server together from its parts, and takes it apart again in order."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import structlog

from flashserve.config import Settings
from flashserve.control.controller import Controller
from flashserve.control.shadow import Shadow
from flashserve.errors import ConflictError, InputError
from flashserve.live.catalogue import Catalogue
from flashserve.live.runtime import MonotonicClock, Runtime
from flashserve.live.savings import Savings
from flashserve.live.savingsreport import price_table
from flashserve.live.service import Service
from flashserve.node.agent import Agent
from flashserve.node.client import Node
from flashserve.node.devices import worker_cores
from flashserve.policy.cost import UNMEASURED, Prices, Rates
from flashserve.policy.plans import Policy
from flashserve.policy.registry import make_policy
from flashserve.store.calibration import read_calibration

_log = structlog.get_logger(__name__)
ALWAYS_COMPARED = ("always-on", "keep-alive-10m")
"""What the savings report compares with."""
_LOCK_NAME = "server.lock"


@contextlib.asynccontextmanager
async def launch(settings: Settings, nodes: Sequence[Node] | None = None) -> AsyncIterator[Service]:
    """A running service, from its first worker's start to its last one's end.

    Must be called on the main thread, because workers die with the thread that created them.
    Leaving cuts off what still runs: `Service.drain` before that lets streams finish.

    Args:
        nodes: what serves the models, not started yet; None: this machine, in this process.

    Raises:
        ConflictError: another server has this data directory.
        CatalogueError: the durable record cannot be read; the message has the remedy.
        InputError: the data directory or the arena cannot be made, or no policy has the name.
    """
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(lock_data_dir(settings.data_dir))
        catalogue = Catalogue(settings.data_dir)
        stack.push_async_callback(catalogue.close)
        await catalogue.open()
        clock, rates = MonotonicClock(), _measured_rates(settings.data_dir)
        prices = Prices.of(settings.price, worker_cores(settings.node))
        policy = _make_policy("policy.name", settings.policy.name, prices)
        savings = _make_savings(settings, prices, rates, catalogue, clock)
        _log.info("prices", **price_table(prices))
        agent = Agent(settings)
        runtime = Runtime(
            Controller(settings.policy, rates, policy, prices, settings.tenant_weights),
            [agent] if nodes is None else nodes,
            clock=clock,
            observe=savings.observe,
        )
        stack.push_async_callback(runtime.close)
        await runtime.start()
        service = Service(settings, runtime, catalogue, savings)
        stack.push_async_callback(service.close)
        agent.deployed = service.deployed
        await service.start()
        yield service


@contextlib.contextmanager
def lock_data_dir(data_dir: Path) -> Iterator[None]:
    """One server per data directory; the kernel gives the lock back when a process dies.

    Raises:
        ConflictError: another process holds it; the message names the process.
        InputError: the directory cannot be made or written.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / _LOCK_NAME, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise InputError(
            f"data directory {data_dir} cannot be used: {error.strerror or error}"
        ) from None
    try:
        _lock(lock, data_dir)
        yield
    finally:
        os.close(lock)


def _make_savings(
    settings: Settings, prices: Prices, rates: Rates, catalogue: Catalogue, clock: MonotonicClock
) -> Savings:
    """With the shadows that it always has, and the one that the settings name."""
    policies = {name: make_policy(name, prices) for name in ALWAYS_COMPARED}
    if name := settings.policy.shadow:
        policies[name] = _make_policy("policy.shadow", name, prices)
    shadows = [Shadow(policy, settings.policy, prices.slo_s, rates) for policy in policies.values()]
    return Savings(settings.policy.name, shadows, prices, catalogue, clock.now)


def _make_policy(setting: str, name: str, prices: Prices) -> Policy:
    try:
        return make_policy(name, prices)
    except InputError as error:
        raise InputError(f"setting {setting}: {error.message}") from None


def _measured_rates(data_dir: Path) -> Rates:
    """What `flashserve calibrate` wrote; a file that cannot be used is logged and left."""
    try:
        calibration = read_calibration(data_dir)
    except InputError as error:
        _log.warning("calibration_not_used", reason=error.message)
        return UNMEASURED
    if calibration is None:
        return UNMEASURED
    return Rates(
        calibration.remote_bytes_per_s, calibration.disk_bytes_per_s, calibration.dram_bytes_per_s
    )


def _lock(lock: int, data_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        raise ConflictError(
            f"another server (process {holder}) uses the data directory {data_dir};"
            " stop it, or choose another with data_dir"
        ) from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
