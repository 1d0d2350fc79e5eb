"""OpenAI's API: models, completions, chat completions."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from flashserve.gateway.answer import Answer
from flashserve.gateway.body import read_object, validate
from flashserve.gateway.edge import context_of
from flashserve.gateway.parameters import refuse_unserved
from flashserve.gateway.replies import (
    ChatShape,
    CompletionShape,
    Shape,
    openai_adapter,
    openai_model,
)
from flashserve.gateway.schema import ChatRequest, CompletionRequest
from flashserve.gateway.schemadoc import json_body
from flashserve.gateway.state import state_of

router = APIRouter(prefix="/v1", tags=["OpenAI"])


@router.post("/chat/completions", openapi_extra=json_body(ChatRequest))
async def create_chat_completion(request: Request) -> Response:
    """OpenAI's chat completion, with a `flashserve` receipt in the body or the last chunk."""
    body = await _read(request, chat=True)
    return _answer(request, validate(ChatRequest, body), ChatShape())


@router.post("/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(request: Request) -> Response:
    """OpenAI's completion, with a `flashserve` receipt in the body or the last chunk."""
    body = await _read(request, chat=False)
    return _answer(request, validate(CompletionRequest, body), CompletionShape())


@router.get("/models")
async def list_models(request: Request) -> Response:
    """Every deployed model, running or not, and the adapters, each with its `parent`."""
    service = state_of(request).service
    data = [openai_model(model) for model in await service.models()]
    data += map(openai_adapter, service.registered())
    return JSONResponse({"object": "list", "data": data})


@router.get("/models/{name:path}")
async def retrieve_model(request: Request, name: str) -> Response:
    service = state_of(request).service
    for adapter in service.registered():
        if name in {adapter.name, f"{adapter.spec.base}:{adapter.name}"}:
            return JSONResponse(openai_adapter(adapter))
    return JSONResponse(openai_model(service.model(name)))


async def _read(request: Request, *, chat: bool) -> dict[str, Any]:
    body = await read_object(request, state_of(request).settings.server.max_body_bytes)
    refuse_unserved(body, chat=chat)
    return body


def _answer(request: Request, asked: ChatRequest | CompletionRequest, shape: Shape) -> Response:
    state, context = state_of(request), context_of(request.scope)
    generation = asked.to_generation(context.received_at)
    return Answer(
        state.service,
        dataclasses.replace(generation, tenant=context.tenant),
        shape,
        state.settings.server,
        is_stream=bool(asked.stream),
        include_usage=asked.include_usage,
    )
