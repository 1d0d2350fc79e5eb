"""Sends one generation to one client: as server-sent events while it runs, or whole at its end.

Raw ASGI, because this is the path that every token takes. The headers of a stream wait a little for
the first token, so that an early error has its own status and Server-Timing can be told. After that
they leave, and comments keep the connection while a model starts.
"""

from __future__ import annotations

import abc
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import msgspec
from msgspec import UNSET, Struct
from starlette.types import Scope, Send

from flashserve.config import ServerSettings
from flashserve.errors import FlashServeError
from flashserve.gateway.faults import error_body, error_response
from flashserve.gateway.feed import Feed
from flashserve.gateway.replies import (
    Envelope,
    Shape,
    WholeChoice,
    Wording,
    receipt_body,
    usage_body,
)
from flashserve.live.requests import GenerationRequest, Receipt, TextChunk
from flashserve.types import Phases

if TYPE_CHECKING:
    from flashserve.live.generation import Generation

OK = "ok"
ABORTED = "aborted"
"""The client went away."""

_DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class ResponseWriter(abc.ABC):
    """What both ways of answering share."""

    def __init__(
        self, feed: Feed, request: GenerationRequest, shape: Shape, scope: Scope, send: Send
    ) -> None:
        self._feed = feed
        self._request = request
        self._shape = shape
        self._scope = scope
        self._send = send

    @abc.abstractmethod
    async def run(self) -> str:
        """Answers. Returns how the request ended: ok, aborted, or an error's code."""

    @property
    def _admitted(self) -> Generation:
        assert self._feed.generation is not None, "nothing comes before the service admits"
        return self._feed.generation

    def _wording(self) -> Wording:
        receipt = self._admitted.receipt
        return Wording(self._shape, self._request.model_id, receipt.request_id)

    async def _refuse(self, error: FlashServeError) -> str:
        await error_response(error)(self._scope, _nothing_to_receive, self._send)
        return error.code

    async def _start(self, content_type: str, extra: Iterable[tuple[bytes, bytes]]) -> None:
        request_id = self._admitted.receipt.request_id
        headers = [
            (b"content-type", content_type.encode()),
            (b"x-request-id", request_id.encode()),
            (b"cache-control", b"no-store"),
            *extra,
        ]
        await self._send({"type": "http.response.start", "status": 200, "headers": headers})

    def _note_first_token(self, emitted_at: float) -> None:
        now = time.monotonic()
        receipt = self._admitted.receipt
        receipt.ttft_s = now - self._request.received_at
        receipt.gateway_out_s = now - emitted_at

    def _final_receipt(self) -> Receipt:
        receipt: Receipt = self._admitted.receipt
        receipt.total_s = time.monotonic() - self._request.received_at
        return receipt


class WholeAnswer(ResponseWriter):
    """One JSON body. Its first-token times are those at which it could have been written."""

    async def run(self) -> str:
        chunks: list[TextChunk] = []
        while not self._feed.is_done or self._feed.has_chunks:
            await self._feed.wait(None)
            if self._feed.is_abandoned:
                return ABORTED
            fresh = self._feed.take()
            if fresh and not chunks:
                self._note_first_token(fresh[0].emitted_at)
            chunks += fresh
        if self._feed.error is not None:
            return await self._refuse(self._feed.error)
        await self._write(join_choices(chunks, self._request.num_choices))
        return OK

    async def _write(self, choices: Sequence[WholeChoice]) -> None:
        receipt = self._final_receipt()
        usage = usage_body(self._admitted.usage)
        body = _encode(self._wording().whole(choices, usage, receipt_body(receipt)))
        length = (b"content-length", str(len(body)).encode())
        await self._start("application/json", [length, _server_timing(receipt.actual)])
        await self._send({"type": "http.response.body", "body": body})


class EventStream(ResponseWriter):
    """Server-sent events; a token that waits is written together with those before it."""

    def __init__(
        self,
        feed: Feed,
        request: GenerationRequest,
        shape: Shape,
        scope: Scope,
        send: Send,
        *,
        include_usage: bool,
        settings: ServerSettings,
    ) -> None:
        super().__init__(feed, request, shape, scope, send)
        self._settings = settings
        self._include_usage = include_usage
        # With include_usage, OpenAI's every chunk has `usage`, null but in the last.
        self._no_usage = None if include_usage else UNSET
        self._opened: set[int] = set()
        self._num_ended = 0
        self._has_spoken = False
        # The end of the last choice is kept back, because the receipt travels with it.
        self._last_end: Struct | None = None

    async def run(self) -> str:
        feed = self._feed
        await self._hold_headers()
        if feed.is_abandoned:
            return ABORTED
        if feed.error is not None and not feed.has_chunks:
            return await self._refuse(feed.error)
        return await self._stream()

    async def _stream(self) -> str:
        feed = self._feed
        self._words = self._wording()
        is_early = feed.has_chunks
        timing = [_server_timing(self._admitted.receipt.actual)] if is_early else []
        await self._start("text/event-stream; charset=utf-8", timing)
        if not is_early:
            await self._comment()
        await self._relay()
        if feed.is_abandoned:
            return ABORTED
        if feed.error is not None:
            await self._write(_error_event(feed.error) + _DONE, more=False)
            return feed.error.code
        await self._write(self._tail(), more=False)
        return OK

    async def _hold_headers(self) -> None:
        """Until the first chunk, the end, the client's leave, or the hold's time is over.

        The hold begins when the service has admitted the request: refusals keep their status.
        """
        feed = self._feed
        hold_until: float | None = None
        while not (feed.has_chunks or feed.is_done or feed.is_abandoned):
            if hold_until is None and feed.generation is not None:
                hold_until = time.monotonic() + self._settings.hold_headers_s
            remaining = None if hold_until is None else hold_until - time.monotonic()
            if remaining is not None and remaining <= 0:
                return
            await feed.wait(remaining)

    async def _relay(self) -> None:
        """Chunks as they come, until none will or the client has gone."""
        feed = self._feed
        while True:
            await self._write_chunks(feed.take())
            if feed.is_abandoned or (feed.is_done and not feed.has_chunks):
                return
            if not await feed.wait(self._settings.comment_interval_s):
                await self._comment()

    async def _write_chunks(self, chunks: Sequence[TextChunk]) -> None:
        said = [choice for chunk in chunks for choice in self._said(chunk)]
        if not said:
            return
        events = [_event(self._words.chunk([choice], self._no_usage)) for choice in said]
        await self._write(b"".join(events))
        if not self._has_spoken:
            self._has_spoken = True
            self._note_first_token(chunks[0].emitted_at)

    def _said(self, chunk: TextChunk) -> list[Struct]:
        """What a chunk adds to the stream: perhaps nothing yet, at most an opening, a text and
        an end.
        """
        has_text = bool(chunk.text or chunk.logprobs)
        if not has_text and chunk.finish_reason is None:
            return []
        said: list[Struct] = []
        if chunk.choice not in self._opened:
            self._opened.add(chunk.choice)
            opening = self._shape.opening(chunk.choice)
            said += [] if opening is None else [opening]
        if has_text:
            said.append(self._shape.piece(chunk))
        if chunk.finish_reason is not None:
            end = self._shape.end(chunk.choice, chunk.finish_reason)
            self._num_ended += 1
            if self._num_ended == self._request.num_choices:
                self._last_end = end
            else:
                said.append(end)
        return said

    def _tail(self) -> bytes:
        assert self._last_end is not None, "each choice ends with a finish reason"
        receipt = receipt_body(self._final_receipt())
        if not self._include_usage:
            return _event(self._words.chunk([self._last_end], receipt=receipt)) + _DONE
        end = _event(self._words.chunk([self._last_end], None))
        usage = usage_body(self._admitted.usage)
        return end + _event(self._words.chunk([], usage, receipt)) + _DONE

    async def _comment(self) -> None:
        await self._write(f": {self._wait_estimate()}\n\n".encode())

    def _wait_estimate(self) -> str:
        predicted = self._admitted.predicted
        if predicted is not None and not self._has_spoken:
            elapsed = time.monotonic() - self._request.received_at
            if (seconds := math.ceil(predicted.total_s - elapsed)) > 0:
                return f"waiting, about {seconds} s"
        return "waiting"

    async def _write(self, data: bytes, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


def join_choices(chunks: Sequence[TextChunk], num_choices: int) -> list[WholeChoice]:
    """The chunks of a finished generation, sorted into its choices."""
    choices = []
    for index in range(num_choices):
        own = [chunk for chunk in chunks if chunk.choice == index]
        has_logprobs = any(chunk.logprobs is not None for chunk in own)
        logprobs = tuple(token for chunk in own for token in chunk.logprobs or ())
        choices.append(
            WholeChoice(
                index,
                "".join(chunk.text for chunk in own),
                logprobs if has_logprobs else None,
                own[-1].finish_reason if own else None,
            )
        )
    return choices


def _event(envelope: Envelope) -> bytes:
    return b"data: " + _encode(envelope) + b"\n\n"


def _error_event(error: FlashServeError) -> bytes:
    return b"event: error\ndata: " + _encode(error_body(error)) + b"\n\n"


def _server_timing(phases: Phases) -> tuple[bytes, bytes]:
    """The Server-Timing header: milliseconds of each phase that took any time."""
    spans = [
        f"{name.removesuffix('_s')};dur={seconds * 1000:.1f}"
        for name in phases.__struct_fields__
        if (seconds := getattr(phases, name)) > 0
    ]
    return b"server-timing", ", ".join(spans).encode()


async def _nothing_to_receive() -> dict[str, str]:
    """The feed reads the connection; a plain response asks for nothing."""
    return {"type": "http.disconnect"}
