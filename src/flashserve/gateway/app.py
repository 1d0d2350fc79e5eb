"""Puts the HTTP server together: routes inside, guards around them, the edge outermost."""

from __future__ import annotations

import importlib.metadata
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from flashserve.config import Settings
from flashserve.gateway import adapters, admin, forecasts, openai, status
from flashserve.gateway.auth import HostGuard, KeyGuard
from flashserve.gateway.edge import Edge
from flashserve.gateway.faults import add_error_handlers
from flashserve.gateway.schema import BODIES
from flashserve.gateway.schemadoc import describe_bodies
from flashserve.gateway.state import GatewayState

if TYPE_CHECKING:
    from flashserve.live.service import Service


def create_app(service: Service, settings: Settings) -> FastAPI:
    """The ASGI application over a started service. It owns neither: closing them is the caller's.

    Interactive documentation pages are off, because they load scripts from elsewhere;
    /openapi.json is there.
    """
    app = FastAPI(
        title="FlashServe",
        version=importlib.metadata.version("flashserve"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.gateway = GatewayState(service, settings)
    for module in (openai, admin, adapters, forecasts, status):
        app.include_router(module.router)
    if settings.server.vllm_adapter_routes:
        app.include_router(adapters.vllm_router)
    add_error_handlers(app)
    describe_bodies(app, BODIES)
    # The last one added is the outermost.
    app.add_middleware(KeyGuard, settings=settings)
    if settings.auth.allowed_origins:
        # A browser's preflight carries no key, so it is answered before one is asked for.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.auth.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "server-timing", "retry-after"],
        )
    app.add_middleware(HostGuard, server=settings.server, auth=settings.auth)
    app.add_middleware(Edge)
    return app
