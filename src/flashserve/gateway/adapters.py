"""Administration of adapters: our own routes, and on request those that vLLM's clients know."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from flashserve.errors import InputError
from flashserve.gateway.body import read_order
from flashserve.gateway.edge import context_of
from flashserve.gateway.schema import AddAdapterRequest, LoadLoraRequest, UnloadLoraRequest
from flashserve.gateway.schemadoc import json_body
from flashserve.gateway.state import state_of
from flashserve.live.requests import AdapterStatus

router = APIRouter(prefix="/admin/v1", tags=["Administration"])
vllm_router = APIRouter(prefix="/v1", tags=["vLLM's adapter routes"])


@router.get("/adapters")
async def list_adapters(
    request: Request, base: Annotated[str | None, Query(max_length=128)] = None
) -> Response:
    """Every adapter, or those of one base, as `flashserve adapter list` shows them."""
    adapters = await state_of(request).service.adapters()
    data = [adapter_body(each) for each in adapters if base in {None, each.base}]
    return JSONResponse({"object": "list", "data": data})


@router.post("/adapters", status_code=201, openapi_extra=json_body(AddAdapterRequest))
async def add_adapter(request: Request) -> Response:
    """Check an adapter, let it answer once, and make it available under a name."""
    order = await read_order(request, AddAdapterRequest)
    adapter = await state_of(request).service.add_adapter(
        order.base,
        order.name,
        order.source,
        trusted=context_of(request.scope).is_trusted,
        replace=order.replace,
    )
    return JSONResponse(adapter_body(adapter), status_code=201)


@router.delete("/adapters/{name:path}")
async def remove_adapter(request: Request, name: str) -> Response:
    """Forget an adapter; its running streams may finish, its source stays as it is."""
    await state_of(request).service.remove_adapter(name)
    return JSONResponse({"name": name, "removed": True})


@vllm_router.post("/load_lora_adapter", openapi_extra=json_body(LoadLoraRequest))
async def load_lora_adapter(request: Request) -> Response:
    """As vLLM's. `base_model_name` may be left out where one model alone is deployed."""
    order = await read_order(request, LoadLoraRequest)
    service = state_of(request).service
    await service.add_adapter(
        order.base_model_name or _only_model(service.model_names()),
        order.lora_name,
        order.lora_path,
        trusted=context_of(request.scope).is_trusted,
        replace=order.load_inplace,
    )
    return PlainTextResponse(f"Success: LoRA adapter '{order.lora_name}' added successfully.")


@vllm_router.post("/unload_lora_adapter", openapi_extra=json_body(UnloadLoraRequest))
async def unload_lora_adapter(request: Request) -> Response:
    """As vLLM's."""
    order = await read_order(request, UnloadLoraRequest)
    await state_of(request).service.remove_adapter(order.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{order.lora_name}' removed successfully.")


def adapter_body(adapter: AdapterStatus) -> dict[str, Any]:
    """The status's fields under their own names, the tier as a word."""
    return {**dataclasses.asdict(adapter), "tier": adapter.tier.label}


def _only_model(names: list[str]) -> str:
    if len(names) != 1:
        raise InputError(
            f"{len(names)} models are deployed: say which in base_model_name",
            param="base_model_name",
        )
    return names[0]
