"""What is expected of each model and adapter, and why that is expected."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from flashserve.forecast.core import QUANTILE_LEVELS
from flashserve.forecast.outlook import Forecast
from flashserve.gateway.state import state_of
from flashserve.live.forecasting import ForecastStatus

router = APIRouter(prefix="/admin/v1", tags=["Administration"])


@router.get("/forecasts")
async def list_forecasts(request: Request) -> Response:
    """What is expected of everything that ever had a request, as `flashserve forecast` shows it."""
    demand = state_of(request).service.demand
    found = await demand.forecasts()
    return JSONResponse(
        {
            "object": "list",
            "status": status_body(demand.status()),
            "data": [forecast_body(each) for each in found],
        }
    )


@router.get("/forecasts/{name:path}")
async def show_forecast(request: Request, name: str) -> Response:
    """What is expected of a model, or of an adapter: NAME or MODEL:NAME."""
    return JSONResponse(forecast_body(await state_of(request).service.demand.forecast(name)))


def forecast_body(forecast: Forecast) -> dict[str, Any]:
    """One entry per lead, with the quantiles of the count by their level."""
    leads = zip(
        forecast.leads_s, forecast.p_arrival, forecast.mean, forecast.quantiles, strict=True
    )
    return {
        "name": forecast.series,
        "made_at": forecast.made_at,
        "model": forecast.model,
        "why": forecast.why,
        "leads": [
            {
                "lead_s": lead_s,
                "p_arrival": p,
                "mean": mean,
                "quantiles": dict(zip(map(str, QUANTILE_LEVELS), quantiles, strict=True)),
            }
            for lead_s, p, mean, quantiles in leads
        ],
        "components": forecast.components,
    }


def status_body(status: ForecastStatus) -> dict[str, Any]:
    """The status's fields under their own names."""
    return dataclasses.asdict(status)
