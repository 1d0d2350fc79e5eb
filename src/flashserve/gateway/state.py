"""What routes are given: the service and the settings, through the application's state."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from starlette.requests import Request

from flashserve.config import Settings

if TYPE_CHECKING:
    from flashserve.live.service import Service


@dataclasses.dataclass(frozen=True, slots=True)
class GatewayState:
    service: Service
    settings: Settings


def state_of(request: Request) -> GatewayState:
    state = request.app.state.gateway
    assert isinstance(state, GatewayState)
    return state
