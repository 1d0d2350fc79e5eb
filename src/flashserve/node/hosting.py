"""Makes and frees the one model of a worker, and prepares in idle time for those that may come."""

from __future__ import annotations

import collections
import gc
import json
import logging
import mmap
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flashserve.config import EngineSettings
from flashserve.engine.engine import Engine
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
    WorkerReady,
)
from flashserve.node.arriving import Arriving, bind_early
from flashserve.store.device.bind import bind
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
    """

    def __init__(self, arena: mmap.mmap, settings: EngineSettings) -> None:
        self._arena = arena
        self._settings = settings
        self._kv_pool = allocate_pool(settings.kv_bytes)
        self._skeletons = Skeletons()
        self._ahead: collections.deque[Iterator[None]] = collections.deque()
        self._engine: Engine | None = None
        self._loaded: LoadModel | None = None
        self._arriving: Arriving | None = None

    @property
    def engine(self) -> Engine | None:
        return self._engine

    def load(self, order: LoadModel) -> LoadReport:
        """Binds a model to its bytes in the arena and puts an engine around it.

        Of an order that is not whole, the engine's steps wait for the bytes that are to come.

        Raises:
            ConflictError: a model is loaded already.
            DeployError: the model is not served, or its tensors do not fit its config.
            UnavailableError: the KV pool is too small for it.
        """
        if self._engine is not None:
            raise ConflictError("the worker holds a model already")
        begin = time.monotonic()
        dtype = choose_dtype(self._settings.dtype, order.tensors)
        model = self._skeletons.take(order.config, dtype)
        built = time.monotonic()
        arriving = None
        if order.is_whole:
            bind(model, order.tensors, self._arena, dtype)
        else:
            arriving = bind_early(model, order, self._arena, dtype)
        bound = time.monotonic()
        eos_ids = eos_token_ids(order.config, order.generation_config)
        gates = arriving.gates if arriving else None
        self._engine = Engine(model, self._settings, self._kv_pool, eos_ids, gates)
        self._loaded, self._arriving = order, arriving
        device_s = bound - built
        return LoadReport(
            device_s=device_s,
            init_s=time.monotonic() - begin - device_s,
            kv=self._engine.kv_usage(),
        )

    def unload(self) -> None:
        """Frees the model; the KV pool stays. No view of the arena is left behind."""
        loaded, self._engine, self._loaded, self._arriving = self._loaded, None, None, None
        gc.collect()
        if loaded is not None:
            self._ahead.append(self._skeleton_pieces(loaded))

    def opened(self, news: Opened) -> None:
        arriving = self._arriving
        if arriving is not None and arriving.model_id == news.model_id:
            arriving.opened(news.num_open)

    def fail_arrival(self, error: FlashServeError) -> None:
        if self._arriving is not None:
            self._arriving.fail(error)

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
        """Imports the architecture's code, then builds its skeleton."""
        preload(model.config)
        yield
        self._skeletons.build(model.config, choose_dtype(self._settings.dtype, model.tensors))


def _skeleton_key(config: dict[str, Any], dtype: torch.dtype) -> str:
    return f"{dtype} {json.dumps(config, sort_keys=True)}"


def start_host(
    arena_fd: int, arena_bytes: int, num_threads: int, settings: EngineSettings
) -> tuple[ModelHost, WorkerReady]:
    """A host past all its first-use work, and what to tell the agent about it."""
    torch.set_num_threads(num_threads)
    arena = attach(arena_fd, arena_bytes)
    os.close(arena_fd)  # the mapping keeps the memory
    host = ModelHost(arena, settings)
    preload()
    warm_up()
    gc.collect()
    gc.freeze()  # what the libraries made stays for good: later collections need not look at it
    return host, WorkerReady(os.getpid(), str(torch.__version__), torch.get_num_threads())
