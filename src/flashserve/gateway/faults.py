"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from flashserve.errors import FlashServeError, InputError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
}
_DEFAULT_RETRY_AFTER_S = 1.0
_JSON = "application/json"


def error_body(error: FlashServeError) -> dict[str, Any]:
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(error.status, kind),
            "param": error.param,
            "code": error.code,
        }
    }


def error_headers(error: FlashServeError) -> dict[str, str]:
    """What belongs to the status: when to come again, or how to show who one is."""
    if error.status in {429, 503}:
        seconds = error.retry_after_s or _DEFAULT_RETRY_AFTER_S
        return {"retry-after": str(max(1, math.ceil(seconds)))}
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    # The rest of a body that is too large is not read, so the connection cannot be used again.
    return {"connection": "close"} if error.status == 413 else {}


def error_response(error: FlashServeError) -> Response:
    return Response(
        msgspec.json.encode(error_body(error)), error.status, error_headers(error), _JSON
    )


def add_error_handlers(app: FastAPI) -> None:
    """Every error of a route, ours or the framework's, leaves in OpenAI's shape."""
    app.add_exception_handler(FlashServeError, _own)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(RequestValidationError, _validation)


async def _own(_: Request, error: Exception) -> Response:
    assert isinstance(error, FlashServeError)
    return error_response(error)


async def _framework(request: Request, error: Exception) -> Response:
    """An unknown path (404), a wrong method (405)."""
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path}"
    named = FlashServeError(f"{where}: {error.detail.lower()}")
    named.status = error.status_code
    named.code = error.detail.lower().replace(" ", "_")
    response = error_response(named)
    response.headers.update(error.headers or {})
    return response


async def _validation(_: Request, error: Exception) -> Response:
    """A query parameter that is not what the route declares."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return error_response(InputError(f"{name}: {first['msg']}", param=name))
