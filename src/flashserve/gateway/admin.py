"""Administration: what is deployed, where its bytes are, and why."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import msgspec
from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from flashserve.gateway.body import read_order
from flashserve.gateway.edge import context_of
from flashserve.gateway.replies import status_body
from flashserve.gateway.schema import DeployRequest, TierRequest
from flashserve.gateway.schemadoc import json_body
from flashserve.gateway.state import state_of
from flashserve.gateway.tiers import tiers_body
from flashserve.live.savings import KEPT_DAYS
from flashserve.policy.schedules import Bounds
from flashserve.telemetry import forget_model
from flashserve.types import Tier

router = APIRouter(prefix="/admin/v1", tags=["Administration"])


@router.get("/models")
async def list_models(request: Request) -> Response:
    """Every deployed model, as `flashserve ps` shows it."""
    models = await state_of(request).service.models()
    return JSONResponse({"object": "list", "data": [status_body(model) for model in models]})


@router.post("/models", status_code=201, openapi_extra=json_body(DeployRequest))
async def deploy_model(request: Request) -> Response:
    """Check a source and make it available under a name; the first request loads it."""
    order = await read_order(request, DeployRequest)
    status = await state_of(request).service.deploy(
        order.name,
        order.source,
        keep_alive_s=order.keep_alive_s,
        bounds=Bounds(order.min_replicas, order.max_replicas, order.target, tuple(order.schedule)),
        trusted=context_of(request.scope).is_trusted,
        replace=order.replace,
    )
    return JSONResponse(status_body(status), status_code=201)


@router.post("/models/{name:path}/stage", openapi_extra=json_body(TierRequest))
async def stage_model(request: Request, name: str) -> Response:
    """Bring a model's bytes up to a tier; answers when they are there."""
    order = await read_order(request, TierRequest)
    status = await state_of(request).service.stage(name, Tier[order.tier.upper()])
    return JSONResponse(status_body(status))


@router.post("/models/{name:path}/evict", openapi_extra=json_body(TierRequest))
async def evict_model(request: Request, name: str) -> Response:
    """Free the bytes that a model takes in a tier and above; answers when they are gone."""
    order = await read_order(request, TierRequest)
    status = await state_of(request).service.evict(name, Tier[order.tier.upper()])
    return JSONResponse(status_body(status))


@router.get("/models/{name:path}")
async def show_model(request: Request, name: str) -> Response:
    return JSONResponse(status_body(state_of(request).service.model(name)))


@router.delete("/models/{name:path}")
async def delete_model(request: Request, name: str) -> Response:
    """Stop a model and forget it; its source stays as it is."""
    await state_of(request).service.delete(name)
    forget_model(name)
    return JSONResponse({"name": name, "deleted": True})


@router.get("/tiers")
async def list_tiers(request: Request) -> Response:
    """What the tiers of each node hold and do just now, as `flashserve ps --tiers` shows it."""
    reports = await state_of(request).service.tiers()
    data = [tiers_body(node_id, report) for node_id, report in sorted(reports.items())]
    return JSONResponse({"object": "list", "data": data})


@router.get("/savings")
async def show_savings(
    request: Request, days: Annotated[int, Query(ge=1, le=KEPT_DAYS)] = 7
) -> Response:
    """What models, adapters and tenants took, and what other policies would have taken."""
    report = await state_of(request).service.savings.report(days)
    return JSONResponse(msgspec.to_builtins(report))


@router.get("/decisions")
async def list_decisions(
    request: Request, limit: Annotated[int, Query(ge=1, le=10_000)] = 100
) -> Response:
    """The latest orders of the controller with their reasons."""
    decisions = state_of(request).service.decisions(limit)
    data = [dataclasses.asdict(decision) for decision in decisions]
    return JSONResponse({"object": "list", "data": data})
