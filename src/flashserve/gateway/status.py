"""Is it alive, is it ready, how is it doing; and a page that says what this server is."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from flashserve import telemetry
from flashserve.errors import DrainingError, UnavailableError
from flashserve.gateway.state import state_of
from flashserve.gateway.tiers import tier_samples
from flashserve.gateway.usage import usage_samples

router = APIRouter(tags=["Status"])

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>FlashServe</title>
<h1>FlashServe</h1>
<p>The API is OpenAI's, under <code>/v1</code>.</p>
<ul>
<li><a href="/v1/models">/v1/models</a>: the deployed models
<li><a href="/admin/v1/models">/admin/v1/models</a>: where their bytes are
<li><a href="/admin/v1/tiers">/admin/v1/tiers</a>: what the tiers hold and fetch
<li><a href="/admin/v1/decisions">/admin/v1/decisions</a>: what was decided, and why
<li><a href="/admin/v1/forecasts">/admin/v1/forecasts</a>: what is expected to be asked for
<li><a href="/admin/v1/savings">/admin/v1/savings</a>: what it cost, and would have cost otherwise
<li><a href="/metrics">/metrics</a>: for Prometheus
<li><a href="/openapi.json">/openapi.json</a>: every route
</ul>
</html>
"""


@router.get("/", include_in_schema=False)
async def show_page() -> Response:
    return HTMLResponse(_PAGE)


@router.get("/healthz")
async def check_health() -> Response:
    """200 as long as the process answers."""
    return JSONResponse({"status": "ok"})


@router.get("/readyz")
async def check_readiness(request: Request) -> Response:
    """200 when requests are taken, else 503."""
    service = state_of(request).service
    if service.draining:
        raise DrainingError("the server is shutting down")
    if not service.is_ready:
        raise UnavailableError("the server is starting")
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def show_metrics(request: Request) -> Response:
    """Prometheus's text format."""
    service = state_of(request).service
    models, reports = await asyncio.gather(service.models(), service.tiers())
    gauges = [
        telemetry.ModelGauges(
            model.name, model.in_flight, model.waiting, model.replicas, model.dram_bytes, model.kv
        )
        for model in models
    ]
    body = telemetry.render_metrics(
        gauges,
        tier_samples(reports),
        service.demand.gauges(),
        usage=usage_samples(service.savings),
    )
    return Response(body, headers={"content-type": telemetry.CONTENT_TYPE})
