"""Reads the JSON body of a request and checks it, whatever was sent."""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec
import pydantic
from starlette.requests import Request

from flashserve.errors import BodyTooLargeError, InputError
from flashserve.gateway.state import state_of

M = TypeVar("M", bound=pydantic.BaseModel)


async def read_object(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object that the request carries.

    Raises:
        BodyTooLargeError: more than max_bytes; no more than that is read.
        InputError: not JSON (NaN and Infinity are not), nested beyond reason, or not an object.
    """
    body = await _read(request, max_bytes)
    try:
        value = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InputError(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise InputError("the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise InputError("the body must be a JSON object")
    return value


async def read_order(request: Request, model: type[M]) -> M:
    """The body as a `model`, within the configured size. Raises as read_object and validate do."""
    max_bytes = state_of(request).settings.server.max_body_bytes
    return validate(model, await read_object(request, max_bytes))


async def _read(request: Request, max_bytes: int) -> bytes:
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise _too_large(max_bytes)
    return bytes(body)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the body is larger than {max_bytes} bytes, which is the limit")


def validate(model: type[M], value: dict[str, Any]) -> M:
    """`value` as a `model`.

    Raises:
        InputError: one line about the first thing that is wrong; `param` is its path.
    """
    try:
        return model.model_validate(value)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        param = _path(first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        raise InputError(f"{param}: {text}" if param else text, param=param or None) from None


def _path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")
