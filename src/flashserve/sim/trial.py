"""Several policies on one workload and cluster, each with a controller that has seen nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.errors import InputError
from flashserve.messages.events import Event
from flashserve.policy import registry
from flashserve.policy.cost import Prices
from flashserve.sim.results import Results
from flashserve.sim.run import Cluster, Progress, simulate
from flashserve.sim.workload import Workload
from flashserve.types import ModelId

PREDICTIVE = "flashserve"
POLICIES = (
    "always-on",
    "keep-alive-60s",
    "keep-alive-600s",
    "keep-alive-3600s",
    "histogram",
    "reactive",
    "serverlessllm",
    registry.ORACLE,
    PREDICTIVE,
)
"""What is compared when nobody says otherwise."""


@dataclasses.dataclass(frozen=True, slots=True)
class Trial:
    """forecasts: gives ForecastReady events with their times, for the policy that uses them."""

    workload: Workload
    cluster: Cluster
    prices: Prices = dataclasses.field(default_factory=Prices)
    settings: PolicySettings = dataclasses.field(default_factory=PolicySettings)
    forecasts: Callable[[], Iterable[tuple[float, Event]]] = tuple

    def run(
        self,
        name: str,
        *,
        is_forecast: bool | None = None,
        told_prices: Prices | None = None,
        progress: Progress | None = None,
        keep_decisions: int = 100,
        keep_phases: bool = True,
    ) -> Results:
        """One policy, by its name.

        is_forecast: whether it is told forecasts; None: if it is the one that uses them.
        told_prices: what the policy weighs with; None: the trial's.
        keep_decisions, keep_phases: as of `simulate`.

        Raises:
            InputError: no policy has this name.
        """
        future = arrivals_of(self.workload) if name == registry.ORACLE else None
        prices = told_prices or self.prices
        policy = registry.make_policy(name, prices, future=future)
        told = name == PREDICTIVE if is_forecast is None else is_forecast
        controller = Controller(self.settings, self.cluster.profile.rates, policy, prices)
        return simulate(
            controller,
            self.workload,
            self.cluster,
            policy=name,
            forecasts=self.forecasts() if told else (),
            keep_decisions=keep_decisions,
            keep_phases=keep_phases,
            progress=progress,
        )


def check_names(names: Sequence[str]) -> None:
    """Raises InputError for a policy that there is not, or that is named twice."""
    for number, name in enumerate(names):
        registry.make_policy(name, Prices(), future={})
        if name in names[:number]:
            raise InputError(f"the policy {name} is named twice")


def arrivals_of(workload: Workload) -> dict[ModelId, list[float]]:
    """When each model's requests come, ascending: what the oracle knows."""
    parts = list(workload.slices())
    if not parts:
        return {}
    at = np.concatenate([part.at for part in parts])
    model = np.concatenate([part.model for part in parts])
    order = np.argsort(model, kind="stable")
    ends = np.cumsum(np.bincount(model, minlength=len(workload.models)))
    pieces = np.split(at[order], ends[:-1])
    return {
        spec.model_id: piece.tolist() for spec, piece in zip(workload.models, pieces, strict=True)
    }


def label_progress(tell: Callable[[str, int, int], None], name: str) -> Progress:
    """Tells virtual minutes done and in all of the named policy."""
    return lambda done, total: tell(name, int(done // 60), int(total // 60))
