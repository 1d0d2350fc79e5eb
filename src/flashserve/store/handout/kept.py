"""Copies of models that other processes have: made once each, counted, bounded."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

import structlog

from flashserve.errors import (
    FlashServeError,
    InternalError,
    ModelTooLargeError,
    UnavailableError,
)
from flashserve.store.checkpoint.files import one_line
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.handout.copies import ModelCopy
from flashserve.store.handout.making import CopyJob

_log = structlog.get_logger()


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    """One copy, there or being made, and how many want or have it."""

    job: CopyJob
    making: asyncio.Task[ModelCopy]
    num_users: int = 0

    @property
    def num_bytes(self) -> int:
        return self.job.snapshot.arena_bytes


class KeptCopies:
    """All copies of a node; one with nobody left stays for keep_s seconds, unless room is needed.

    A copy that is still being made when the last who wanted it has gone is given up. Everything
    runs on one event loop.

    Args:
        executor: reading may take minutes, in threads that nobody else waits for.
        max_bytes: of all copies together.
    """

    def __init__(self, executor: Executor, max_bytes: int, keep_s: float) -> None:
        self._executor = executor
        self._max_bytes = max_bytes
        self._keep_s = keep_s
        # By the identity of the content: those that may be asked for.
        self._found: dict[str, _Entry] = {}
        # Also those that were given up, until they take no memory any more.
        self._entries: set[_Entry] = set()
        # Those without users and when they go, the one that has waited longest first. An order of
        # its own: the loop's clock may count in milliseconds, so times can be equal.
        self._unused: dict[_Entry, asyncio.TimerHandle] = {}

    @property
    def num_bytes(self) -> int:
        """Memory that copies take, or will when they are made."""
        return sum(entry.num_bytes for entry in self._entries)

    def users(self) -> collections.Counter[str]:
        """How many have or wait for a copy, by the uri of its source."""
        counts = collections.Counter[str]()
        for entry in self._entries:
            counts[entry.job.snapshot.uri] += entry.num_users
        return counts

    @contextlib.asynccontextmanager
    async def use(
        self, snapshot: Snapshot, make_job: Callable[[], CopyJob]
    ) -> AsyncIterator[ModelCopy]:
        """The copy of a model, made unless it is there, and kept as long as the context lasts.

        Raises:
            ModelTooLargeError: it is larger than all copies together may be.
            UnavailableError: others take the room.
            FlashServeError: what making it raised.
        """
        while (entry := self._found.get(snapshot.identity)) is None:
            if await self._has_room(snapshot):
                entry = self._start(make_job())
                break
        self._wanted(entry)
        entry.num_users += 1
        try:
            yield await asyncio.shield(entry.making)
        finally:
            entry.num_users -= 1
            if not entry.num_users:
                self._left(entry)

    async def close(self) -> None:
        """Gives everything up, and returns when no thread works for it."""
        self._keep_s = 0.0
        for entry in tuple(self._entries):
            self._give_up(entry)
        await asyncio.gather(*(entry.making for entry in self._entries), return_exceptions=True)

    def _start(self, job: CopyJob) -> _Entry:
        entry = _Entry(job, asyncio.create_task(self._make(job)))
        self._found[job.snapshot.identity] = entry
        self._entries.add(entry)
        return entry

    async def _make(self, job: CopyJob) -> ModelCopy:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, job.run)
        except FlashServeError:
            raise
        except Exception as error:
            _log.exception("handout_failed", source=job.snapshot.uri)
            raise InternalError(f"the copy failed: {one_line(error)}") from error

    async def _has_room(self, snapshot: Snapshot) -> bool:
        """Makes room of what nobody uses. False: look again, for memory has come back meanwhile."""
        num_bytes = snapshot.arena_bytes
        what = f"a copy of {snapshot.uri} takes {num_bytes} bytes"
        if num_bytes > self._max_bytes:
            raise ModelTooLargeError(
                f"{what}, and all copies together may take {self._max_bytes}: raise "
                "store.handout_bytes"
            )
        for entry in tuple(self._unused):
            if self.num_bytes + num_bytes <= self._max_bytes:
                break
            self._give_up(entry)
        if self.num_bytes + num_bytes <= self._max_bytes:
            return True
        if given_up := self._entries - set(self._found.values()):
            await asyncio.wait([entry.making for entry in given_up])
            return False
        raise UnavailableError(
            f"{what}, and {self.num_bytes} of {self._max_bytes} are taken by other processes: end "
            "one, or raise store.handout_bytes"
        )

    def _wanted(self, entry: _Entry) -> None:
        if timer := self._unused.pop(entry, None):
            timer.cancel()

    def _left(self, entry: _Entry) -> None:
        is_made = entry.making.done() and not entry.making.cancelled()
        if self._keep_s and is_made and entry.making.exception() is None:
            loop = asyncio.get_running_loop()
            self._unused[entry] = loop.call_later(self._keep_s, self._give_up, entry)
        else:
            self._give_up(entry)

    def _give_up(self, entry: _Entry) -> None:
        """Nobody finds the copy any more, and its memory goes as soon as it is not written to."""
        self._wanted(entry)
        identity = entry.job.snapshot.identity
        if self._found.get(identity) is entry:
            del self._found[identity]
        if entry not in self._entries:
            return
        entry.job.stop()
        if entry.making.done():
            self._free(entry)
        else:
            entry.making.add_done_callback(lambda _: self._free(entry))

    def _free(self, entry: _Entry) -> None:
        if entry in self._entries:
            self._entries.discard(entry)
            if not entry.making.cancelled() and entry.making.exception() is None:
                entry.making.result().close()
