"""A worker program without tensors: the real loop and link, and an engine that follows a script.

The script is `fake` in the checkpoint's config.json, see `Script`. Token i of a sequence is
1000 + i.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import time
from typing import ClassVar

from flashserve.engine.gates import Gates
from flashserve.errors import FlashServeError, SelfCheckError, error_from_code
from flashserve.messages.work import (
    AdapterImage,
    DescribeModel,
    GenerateJob,
    LoadModel,
    LoadReport,
    ModelDescription,
    Opened,
    Prepare,
    UnloadReport,
    WorkerReady,
)
from flashserve.node.link import Link
from flashserve.node.serving import EngineUnusableError, Serving
from flashserve.node.worker import die_with_parent, parse_arguments
from flashserve.types import AdapterId, KVUsage, ModelId, TokenOutput


@dataclasses.dataclass
class Script:
    load_error: tuple[str, str] | None = None
    load_s: float = 0.0
    dies_in_load: bool = False
    step_s: float = 0.0
    fails_at_step: int = -1
    loses_memory: bool = False
    fails_its_check: bool = False
    sleeps: bool = False
    refuses_job: bool = False


class FakeEngine:
    def __init__(self, script: Script, gates: Gates) -> None:
        self._script = script
        self._gates = gates
        self._left: dict[str, tuple[int, int]] = {}
        self._num_steps = 0
        self._lost = 0

    @property
    def has_work(self) -> bool:
        return bool(self._left)

    @property
    def num_running(self) -> int:
        return len(self._left)

    num_waiting = 0
    reused: ClassVar[dict[str, int]] = {}
    failed: ClassVar[dict[str, FlashServeError]] = {}

    @property
    def waited_s(self) -> float:
        return self._gates.waited_s

    def kv_usage(self) -> KVUsage:
        used = len(self._left) + self._lost
        return KVUsage(total=1000, used=used, cached=0, free=1000 - used)

    def add(self, job: GenerateJob) -> None:
        if self._script.refuses_job:
            raise error_from_code("context_length_exceeded", "the prompt is too long")
        self._left[job.sequence_id] = (len(job.emitted_ids), job.params.max_tokens)

    def put_adapter(self, image: AdapterImage) -> None:
        print(f"has {image.adapter_id}", flush=True)

    def prefetch_adapter(self, adapter_id: AdapterId) -> None:
        print(f"loads {adapter_id}", flush=True)

    def drop_adapter(self, adapter_id: AdapterId, *, is_damaged: bool = False) -> None:
        print(f"drops {'damaged ' * is_damaged}{adapter_id}", flush=True)

    def abort(self, sequence_id: str) -> None:
        self._left.pop(sequence_id, None)

    def step(self) -> list[tuple[str, TokenOutput]]:
        for group in range(self._gates.num_groups):
            self._gates.wait(group)
        time.sleep(self._script.step_s)
        self._num_steps += 1
        if self._num_steps == self._script.fails_at_step:
            self._lost = int(self._script.loses_memory)
            raise RuntimeError("the script says so")
        return [self._emit(sequence_id) for sequence_id in list(self._left)]

    def _emit(self, sequence_id: str) -> tuple[str, TokenOutput]:
        index, end = self._left.pop(sequence_id)
        is_last = index + 1 == end
        if not is_last:
            self._left[sequence_id] = (index + 1, end)
        reason = "length" if is_last else None
        return sequence_id, TokenOutput(index, 1000 + index, finish_reason=reason)


class FakeHost:
    def __init__(self) -> None:
        self.engine: FakeEngine | None = None
        self.loaded: LoadModel | None = None
        self._gates = Gates(0)
        self._script = Script()
        self._asleep: list[ModelId] = []

    def load(self, order: LoadModel) -> LoadReport:
        self._script = script = Script(**order.config.get("fake", {}))
        time.sleep(script.load_s)
        if script.dies_in_load:
            os.kill(os.getpid(), signal.SIGKILL)
        if script.load_error:
            raise error_from_code(*script.load_error)
        self._gates = Gates(order.num_groups)
        self._gates.open(order.num_open)
        self.engine = FakeEngine(script, self._gates)
        self.loaded = order
        return LoadReport(0.0, 0.0, self.engine.kv_usage())

    def unload(self) -> UnloadReport:
        if self.loaded is not None and self._script.sleeps:
            self._asleep.append(self.loaded.model_id)
        self.engine = self.loaded = None
        return UnloadReport(tuple(self._asleep))

    def check(self) -> None:
        if self._script.fails_its_check:
            raise SelfCheckError("the script says that it differs")

    failure = None

    def opened(self, news: Opened) -> None:
        self._gates.open(news.num_open)

    def fail_arrival(self, error: FlashServeError) -> None:
        self._gates.fail(error)

    def describe(self, order: DescribeModel) -> ModelDescription:
        return ModelDescription("Fake", 4096, sum(len(t.shape) for t in order.tensors), 64)

    def prepare(self, hint: Prepare) -> None:
        print(f"hinted {hint.extents}", flush=True)

    def work_ahead(self) -> bool:
        return False


def main() -> int:
    arguments = parse_arguments(None)
    die_with_parent(arguments.parent_pid)
    if delay := os.environ.get("FAKE_WORKER_START"):
        if delay == "fails":
            print("cannot start today", flush=True)
            return 3
        time.sleep(float(delay))
    print("hello from the worker", flush=True)
    link = Link(socket.socket(fileno=arguments.socket_fd))
    try:
        Serving(link, FakeHost(), WorkerReady(os.getpid(), "none", arguments.threads)).run()
    except ConnectionError:
        return 0
    except EngineUnusableError as error:
        print(error, flush=True)
    return 70


if __name__ == "__main__":
    os._exit(main())
