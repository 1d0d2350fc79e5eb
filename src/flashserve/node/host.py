"""What a worker's loop asks of the side that knows tensors."""

from __future__ import annotations

from typing import Protocol

from flashserve.errors import FlashServeError
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
)
from flashserve.types import AdapterId, KVUsage, TokenOutput


class BatchingEngine(Protocol):
    """What serving needs of an engine; see engine/engine.py."""

    def add(self, job: GenerateJob) -> None: ...
    def put_adapter(self, image: AdapterImage) -> None: ...
    def prefetch_adapter(self, adapter_id: AdapterId) -> None: ...
    def drop_adapter(self, adapter_id: AdapterId, *, is_damaged: bool = False) -> None: ...
    def abort(self, sequence_id: str) -> None: ...
    def step(self) -> list[tuple[str, TokenOutput]]: ...
    def kv_usage(self) -> KVUsage: ...
    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def waited_s(self) -> float: ...
    @property
    def reused(self) -> dict[str, int]: ...
    @property
    def failed(self) -> dict[str, FlashServeError]: ...


class Host(Protocol):
    """Makes and frees the one model of a worker; see node/hosting.py."""

    @property
    def engine(self) -> BatchingEngine | None: ...
    def load(self, order: LoadModel) -> LoadReport: ...
    def unload(self) -> UnloadReport: ...
    @property
    def loaded(self) -> LoadModel | None: ...
    def check(self) -> None:
        """Raises SelfCheckError: the loaded model does not compute what it should."""

    @property
    def failure(self) -> FlashServeError | None:
        """Why bytes of the loaded model will never be there."""

    def opened(self, news: Opened) -> None:
        """More bytes of the loaded model are there; also while a step waits for them."""

    def fail_arrival(self, error: FlashServeError) -> None:
        """A step that waits for bytes of the loaded model, or ever will, raises `error`."""

    def describe(self, order: DescribeModel) -> ModelDescription: ...
    def prepare(self, hint: Prepare) -> None: ...
    def work_ahead(self) -> bool:
        """Does one short piece of what `prepare` asked for; False when nothing is left."""
