"""Makes and frees the one model of a worker, and prepares in idle time for those that may come."""

from __future__ import annotations

import collections
import gc
import json
import logging
import mmap
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
from flashserve.engine.gates import Gates
from flashserve.engine.loading import (
    build_skeleton,
    choose_dtype,
    describe,
    eos_token_ids,
    preload,
)
from flashserve.engine.runner import allocate_pool
from flashserve.engine.warmup import warm_up
from flashserve.errors import ConflictError, FlashServeError
from flashserve.messages.work import (
    DescribeModel,
    LoadModel,
    LoadReport,
    ModelDescription,
    Opened,
    Prepare,
    UnloadReport,
    WorkerReady,
)
from flashserve.node.homes import ArenaHome, DeviceHome, Home
from flashserve.store.device.bind import reader
from flashserve.store.device.copier import CudaCopier
from flashserve.store.device.regions import RegisteredArena, address_of
from flashserve.store.dram.arena import attach

_log = logging.getLogger(__name__)

_MADV_POPULATE_READ = 22  # Linux 5.14; not yet in Python's mmap
_TOUCH_BYTES = 32 << 20
"""Page tables of so many bytes are filled between two looks at the socket; some 5 ms."""
_MAX_SKELETONS = 8


class Skeletons:
    """Modules on the meta device, built ahead of the load that binds them. Each is taken once."""

    def __init__(self) -> None:
        self._built: collections.OrderedDict[str, nn.Module] = collections.OrderedDict()

    def build(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        key = _skeleton_key(config, dtype)
        if key not in self._built:
            self._built[key] = build_skeleton(config, dtype)
        self._built.move_to_end(key)
        while len(self._built) > _MAX_SKELETONS:
            self._built.popitem(last=False)

    def take(self, config: dict[str, Any], dtype: torch.dtype) -> nn.Module:
        ready = self._built.pop(_skeleton_key(config, dtype), None)
        return ready if ready is not None else build_skeleton(config, dtype)


class ModelHost:
    """The tensors of one worker: the arena's mapping, the KV pool, at most one engine.

    Args:
        arena: this process's only mapping of the node's arena, read-only.
        settings: of every engine that it makes.
        home: where its models live; in the arena if not given.
    """

    def __init__(
        self, arena: mmap.mmap, settings: EngineSettings, home: Home | None = None
    ) -> None:
        self._arena = arena
        self._settings = settings
        self._home = home or ArenaHome(arena)
        self._kv_pool = allocate_pool(settings.kv_bytes, self._home.device)
        self._skeletons = Skeletons()
        self._ahead: collections.deque[Iterator[None]] = collections.deque()
        self._engine: Engine | None = None
        self._loaded: LoadModel | None = None
        self._gates: Gates | None = None
        self._is_checked = False

    @property
    def engine(self) -> Engine | None:
        return self._engine

    def load(self, order: LoadModel) -> LoadReport:
        """Gives a model its weights, or wakes it, and puts an engine around it.

        The engine's steps wait for bytes that are to come, or are being copied.

        Raises:
            ConflictError: a model is loaded already.
            DeployError: the model is not served, or its tensors do not fit its config.
            UnavailableError: the KV pool, or the device, is too small for it.
            InternalError: the device failed.
        """
        if self._engine is not None:
            raise ConflictError("the worker holds a model already")
        begin = time.monotonic()
        dtype = choose_dtype(self._settings.dtype, order.tensors)
        building_s = 0.0

        def build() -> nn.Module:
            nonlocal building_s
            started = time.monotonic()
            model = self._skeletons.take(order.config, dtype)
            building_s = time.monotonic() - started
            return model

        taking = time.monotonic()
        taken = self._home.take(order, dtype, build)
        device_s = time.monotonic() - taking - building_s
        eos_ids = eos_token_ids(order.config, order.generation_config)
        try:
            self._engine = Engine(
                taken.model,
                self._settings,
                self._kv_pool,
                eos_ids,
                taken.gates,
                read_adapter=reader(self._arena),
            )
        except BaseException:
            self._home.release()
            raise
        self._loaded, self._gates, self._is_checked = order, taken.gates, False
        return LoadReport(
            device_s=device_s,
            init_s=time.monotonic() - begin - device_s,
            kv=self._engine.kv_usage(),
            was_asleep=taken.was_asleep,
        )

    def unload(self) -> UnloadReport:
        """Puts the model to sleep; the KV pool stays. No view of the arena is left behind.

        Raises:
            InternalError: the device failed; the model is gone.
        """
        loaded, engine = self._loaded, self._engine
        self._engine = self._loaded = self._gates = None
        if engine is not None:
            engine.close()
            del engine
        if loaded is not None:
            self._home.release()
            self._ahead.append(self._skeleton_pieces(loaded))
        gc.collect()
        return UnloadReport(self._home.asleep)

    def check(self) -> None:
        """Compares what the model computes with what it computed before, once all of it is there.

        Does something at one call after each load, best the one after the first token.

        Raises:
            SelfCheckError: it differs. Unload the model, which cannot be computed with any more.
        """
        is_whole = self._gates is None or self._gates.is_open
        if self._engine is not None and is_whole and not self._is_checked:
            self._is_checked = True
            self._home.verify()

    @property
    def loaded(self) -> LoadModel | None:
        return self._loaded

    @property
    def failure(self) -> FlashServeError | None:
        """Why the loaded model will never be whole."""
        return self._gates.failure if self._gates is not None else None

    def opened(self, news: Opened) -> None:
        loaded, gates = self._loaded, self._gates
        if loaded is not None and gates is not None and loaded.model_id == news.model_id:
            gates.open(news.num_open)

    def fail_arrival(self, error: FlashServeError) -> None:
        if (gates := self._gates) is not None:
            gates.fail(error)

    def describe(self, order: DescribeModel) -> ModelDescription:
        return describe(order.config, order.tensors)

    def prepare(self, hint: Prepare) -> None:
        for extent in hint.extents:
            self._ahead.append(self._touch_pieces(*extent))
        self._ahead.append(self._skeleton_pieces(hint))

    def work_ahead(self) -> bool:
        if not self._ahead:
            return False
        try:
            next(self._ahead[0])
        except StopIteration:
            self._ahead.popleft()
        except (FlashServeError, OSError) as error:
            _log.warning("a hint was of no use: %s", error)
            self._ahead.popleft()
        return bool(self._ahead)

    def _touch_pieces(self, offset: int, num_bytes: int) -> Iterator[None]:
        """Fills this mapping's page tables, whose walk at first touch is slow, for a range."""
        end = min(offset + num_bytes, len(self._arena))
        for begin in range(offset - offset % mmap.PAGESIZE, end, _TOUCH_BYTES):
            self._arena.madvise(_MADV_POPULATE_READ, begin, min(_TOUCH_BYTES, end - begin))
            yield

    def _skeleton_pieces(self, model: Prepare | LoadModel) -> Iterator[None]:
        """Imports the architecture's code, then builds its skeleton. A sleeping one needs none."""
        dtype = choose_dtype(self._settings.dtype, model.tensors)
        if self._home.would_wake(model.identity, dtype):
            return
        preload(model.config)
        yield
        self._skeletons.build(model.config, dtype)


def _skeleton_key(config: dict[str, Any], dtype: torch.dtype) -> str:
    return f"{dtype} {json.dumps(config, sort_keys=True)}"


def start_host(
    arena_fd: int,
    arena_bytes: int,
    num_threads: int,
    settings: EngineSettings,
    device: str = "cpu",
    references: pathlib.Path | None = None,
) -> tuple[ModelHost, WorkerReady]:
    """A host past all its first-use work, and what to tell the agent about it.

    Args:
        device: cpu, cuda, or auto for the better one that is there.
        references: of self-checks, see `DeviceHome`.

    Raises:
        UnavailableError: the device is not there, or has no memory for the KV pool.
    """
    torch.set_num_threads(num_threads)
    arena = attach(arena_fd, arena_bytes)
    os.close(arena_fd)  # the mapping keeps the memory
    home = _open_home(device, arena, references)
    host = ModelHost(arena, settings, home)
    preload()
    warm_up(home.device)
    gc.collect()
    gc.freeze()  # what the libraries made stays for good: later collections need not look at it
    name = str(home.device)
    return host, WorkerReady(os.getpid(), str(torch.__version__), torch.get_num_threads(), name)


def _open_home(device: str, arena: mmap.mmap, references: pathlib.Path | None) -> Home:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return ArenaHome(arena)
    copier = CudaCopier(torch.device("cuda"))
    registered = RegisteredArena(copier, address_of(arena), len(arena))
    if registered.refusal is not None:
        _log.warning("copies to the device will be slow: %s", registered.refusal)
    return DeviceHome(copier, arena, registered, references)
