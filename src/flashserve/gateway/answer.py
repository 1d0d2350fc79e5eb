"""The response of a generation request: runs it, writes it, and counts it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from flashserve import telemetry
from flashserve.config import ServerSettings
from flashserve.gateway.feed import Feed
from flashserve.gateway.replies import Shape
from flashserve.gateway.stream import ABORTED, EventStream, ResponseWriter, WholeAnswer
from flashserve.live.requests import GenerationRequest

if TYPE_CHECKING:
    from flashserve.live.generation import Generation
    from flashserve.live.service import Service

_log = structlog.get_logger(__name__)


class Answer(Response):
    """Starlette calls it once, with the connection of the request whose body has been read."""

    def __init__(
        self,
        service: Service,
        request: GenerationRequest,
        shape: Shape,
        settings: ServerSettings,
        *,
        is_stream: bool,
        include_usage: bool,
    ) -> None:
        # No super().__init__(): status, headers and body are not known yet.
        self.background = None
        self._service = service
        self._request = request
        self._shape = shape
        self._settings = settings
        self._is_stream = is_stream
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outcome = ABORTED
        feed = Feed(self._service, self._request, receive)
        try:
            async with feed:
                outcome = await self._writer(feed, scope, send).run()
        finally:
            self._observe(feed, outcome)

    def _writer(self, feed: Feed, scope: Scope, send: Send) -> ResponseWriter:
        if not self._is_stream:
            return WholeAnswer(feed, self._request, self._shape, scope, send)
        return EventStream(
            feed,
            self._request,
            self._shape,
            scope,
            send,
            include_usage=self._include_usage,
            settings=self._settings,
        )

    def _observe(self, feed: Feed, outcome: str) -> None:
        if feed.generation is None:
            model = self._request.model_id
            is_known = model in self._service.model_names()
            telemetry.observe_refusal(model if is_known else "", outcome)
            return
        served = served_request(feed.generation, outcome, feed.pace.tpot_s)
        telemetry.observe_request(served)
        _log.info(
            "served",
            request_id=feed.generation.receipt.request_id,
            model=served.model,
            outcome=outcome,
            tier=served.tier.label,
            cold=served.cold,
            ttft_s=served.ttft_s,
            total_s=feed.generation.receipt.total_s,
            completion_tokens=served.completion_tokens,
        )


def served_request(
    generation: Generation, outcome: str, tpot_s: float | None
) -> telemetry.ServedRequest:
    receipt, usage = generation.receipt, generation.usage
    return telemetry.ServedRequest(
        model=receipt.model_id,
        outcome=outcome,
        tier=receipt.tier,
        cold=receipt.cold,
        phases=receipt.actual,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        completion_tokens=usage.completion_tokens,
        ttft_s=receipt.ttft_s,
        tpot_s=tpot_s,
        gateway_in_s=receipt.gateway_in_s,
        gateway_out_s=receipt.gateway_out_s,
    )
