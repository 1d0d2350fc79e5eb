"""Runs one generation beside the response that it feeds, and notices when the client leaves."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import TYPE_CHECKING, Self

import structlog
from starlette.types import Receive

from flashserve.errors import FlashServeError, InternalError
from flashserve.live.requests import GenerationRequest, TextChunk

if TYPE_CHECKING:
    from flashserve.live.generation import Generation
    from flashserve.live.service import Service

_MAX_WAITING = 256
"""Chunks that may wait for a slow client; then the service is not asked for more."""
_log = structlog.get_logger(__name__)


class Pace:
    """Time per output token of one choice, from the times at which its tokens were known."""

    def __init__(self) -> None:
        self._first_at: float | None = None
        self._last_at = 0.0
        self._num_later = 0

    def note(self, chunk: TextChunk) -> None:
        if self._first_at is None:
            self._first_at = chunk.emitted_at
        elif chunk.num_tokens:
            self._num_later += chunk.num_tokens
            self._last_at = chunk.emitted_at

    @property
    def tpot_s(self) -> float | None:
        """None until there is a token after the first ones."""
        if self._first_at is None or not self._num_later:
            return None
        return (self._last_at - self._first_at) / self._num_later


class Feed:
    """What a generation has produced waits here until it is taken, all of it at once.

    Use as an async context manager: leaving it aborts whatever still runs. `receive` belongs to
    the feed from then on; the request's body must have been read.

    generation: None until the service has admitted the request.
    error: why it failed; set before is_done.
    is_done: nothing more will come (but some may still wait to be taken).
    is_abandoned: the client went away.
    pace: of the first choice.
    """

    def __init__(self, service: Service, request: GenerationRequest, receive: Receive) -> None:
        self.generation: Generation | None = None
        self.error: FlashServeError | None = None
        self.is_done = False
        self.is_abandoned = False
        self.pace = Pace()
        self._service = service
        self._request = request
        self._receive = receive
        self._chunks: list[TextChunk] = []
        self._wake = asyncio.Event()
        self._has_room = asyncio.Event()
        self._has_room.set()

    async def __aenter__(self) -> Self:
        self._tasks = (asyncio.create_task(self._run()), asyncio.create_task(self._watch()))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.generation is not None:
            await self.generation.aclose()

    @property
    def has_chunks(self) -> bool:
        return bool(self._chunks)

    def take(self) -> list[TextChunk]:
        """Everything that has come since the last call, oldest first."""
        chunks, self._chunks = self._chunks, []
        self._has_room.set()
        return chunks

    async def wait(self, timeout_s: float | None) -> bool:
        """Until something changes; False if nothing did within timeout_s (None: for ever)."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    async def _run(self) -> None:
        try:
            self.generation = await self._service.submit(self._request)
            self._wake.set()
            async for chunk in self.generation:
                self._chunks.append(chunk)
                if chunk.choice == 0:
                    self.pace.note(chunk)
                self._wake.set()
                if len(self._chunks) >= _MAX_WAITING:
                    self._has_room.clear()
                    await self._has_room.wait()
        except FlashServeError as error:
            self.error = error
        except Exception:
            _log.exception("generation failed", model=self._request.model_id)
            self.error = InternalError("the server failed; its log says why")
        finally:
            self.is_done = True
            self._wake.set()

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.is_abandoned = True
        self._wake.set()
