"""How many replicas each model is to have: forecasts and bounds, as they change."""

from __future__ import annotations

import dataclasses

from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.messages.events import BoundsChanged, ForecastReady


def forecast_ready(state: State, event: ForecastReady) -> list[Command]:
    """Series that are no deployed model's (an adapter's, or one just deleted) change nothing."""
    for forecast in event.forecasts:
        if model := state.find(forecast.series):
            model.forecast = forecast
    return []


def bounds_changed(state: State, event: BoundsChanged) -> list[Command]:
    if model := state.find(event.model_id):
        model.spec = dataclasses.replace(model.spec, scaling=event.scaling)
    return []
