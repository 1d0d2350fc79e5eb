"""The outermost layer of the HTTP server: times, names and logs each request, contains faults.

Pure ASGI, so that a stream passes with one call per write.
"""

from __future__ import annotations

import dataclasses
import time
import uuid

import structlog
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flashserve import telemetry
from flashserve.errors import InternalError
from flashserve.gateway.faults import error_response

_log = structlog.get_logger(__name__)
_SCOPE_KEY = "flashserve"


@dataclasses.dataclass(frozen=True, slots=True)
class RequestContext:
    """What the edge knows of a request before anybody has looked into it.

    received_at: time.monotonic() when the request's headers were complete.
    is_trusted: it came over the private Unix socket, so from this user on this machine.
    tenant: whose key it came with, as KeyGuard found; "" without a name.
    """

    request_id: str
    received_at: float
    is_trusted: bool
    tenant: str = ""


def name_tenant(scope: Scope, tenant: str) -> None:
    """Say whose key the request came with."""
    scope[_SCOPE_KEY] = dataclasses.replace(context_of(scope), tenant=tenant)


def context_of(scope: Scope) -> RequestContext:
    context = scope[_SCOPE_KEY]
    assert isinstance(context, RequestContext)
    return context


class Edge:
    """ASGI middleware; must be the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(uuid.uuid4().hex, time.monotonic(), is_over_unix_socket(scope))
        scope[_SCOPE_KEY] = context
        status: int | None = None

        async def named_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).setdefault("x-request-id", context.request_id)
            await send(message)

        with structlog.contextvars.bound_contextvars(http_request_id=context.request_id):
            try:
                await self._app(scope, receive, named_send)
            except ClientDisconnect:
                _log.debug("client left before its request was complete", path=scope["path"])
            except Exception:
                _log.exception("request failed", method=scope["method"], path=scope["path"])
                if status is not None:
                    raise
                error = InternalError("the server failed; its log says why")
                await error_response(error)(scope, receive, named_send)
        if status is not None:
            telemetry.observe_response(status)


def is_over_unix_socket(scope: Scope) -> bool:
    """Uvicorn gives (path, None) as the server of an AF_UNIX connection, and never for TCP."""
    server = scope.get("server")
    return server is not None and server[1] is None
