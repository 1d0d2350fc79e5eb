"""What the controller knows of the requests that have come for a model, and of those to come."""

from __future__ import annotations

import dataclasses

from flashserve.policy.hazards import Hazards
from flashserve.types import SeriesForecast


@dataclasses.dataclass(slots=True, kw_only=True)
class Demand:
    last_arrival_at: float | None = None
    forecast: Hazards | None = None
    """The newest; whether it is too old is for who reads it."""
    unseen_since: float | None = None
    """When the first request came that the forecast does not know of; None when it knows all."""

    def request_came(self, now: float) -> None:
        self.last_arrival_at = now
        if self.unseen_since is None:
            self.unseen_since = now

    def hear(self, said: SeriesForecast) -> None:
        """A newer forecast: it knows of what came until it was made."""
        self.forecast = Hazards(said)
        if self.unseen_since is None:
            return
        if self.last_arrival_at is None or self.last_arrival_at <= said.made_at:
            self.unseen_since = None
        else:
            self.unseen_since = max(self.unseen_since, said.made_at)
