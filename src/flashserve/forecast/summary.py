"""What a backtest found, in figures that a person reads and a script parses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from flashserve.errors import InputError
from flashserve.forecast import backtest, decisions, registry, scores
from flashserve.forecast.backtest import COLD_COSTS, COLD_SHARES, LEADS, Forecasts, Split
from flashserve.forecast.core import ArrivalModel, Floats
from flashserve.forecast.decisions import Outcome
from flashserve.forecast.traces import DAY, Trace

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Decided:
    """One way to decide: share of cold starts, idle minutes, and those over a keep-alive's.

    idle_ratio: to the fixed keep-alive with the same share of cold starts on the reported time;
    NaN where none is as seldom cold.
    """

    cold_share: float
    idle_minutes: float
    idle_ratio: float


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A model or policy. cost: by cost of a cold start (minutes), to that keep-alive's.

    at: by the share of cold starts that was aimed at; policies have only what they do. log_loss:
    by lead (minutes), over all series; log_loss_by_cohort: the same within each.
    """

    name: str
    at: dict[str, Decided]
    cost: dict[str, float]
    log_loss: dict[str, float]
    log_loss_by_cohort: dict[str, dict[str, float]]
    calibration_error: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Summary:
    trace: str
    num_fitted: int
    num_reported: int
    fitted_minutes: int
    reported_minutes: int
    cohorts: dict[str, int]
    rows: list[Row]


@dataclasses.dataclass(frozen=True, slots=True)
class Ran:
    """Everything that a report draws: the split, each model with its forecasts, the outcomes."""

    parts: Split
    models: list[tuple[ArrivalModel, Forecasts]]
    policies: dict[str, Outcome]
    keep_alives: Outcome
    summary: Summary


def run(trace: Trace, names: Sequence[str], seed: int, progress: Progress) -> Ran:
    """Backtests models and what platforms do on one trace, of its series below one a minute.

    Traces of at most a day are divided into halves of series as well as in time.

    Raises:
        InputError: a name is not known, or the trace is too short, or nothing is left to decide.
    """
    models = registry.make_models(names, seed)
    chosen = backtest.below(trace, 1.0)
    if not chosen.history.names:
        raise InputError(
            f"all series of {trace.name} have an arrival a minute or more: "
            "there is nothing to decide about models that are always busy"
        )
    is_short = trace.history.counts.shape[1] <= DAY and len(chosen.history.names) >= 8
    parts = backtest.split(chosen, halves=is_short)
    reference = backtest.keep_alives(parts)
    ran = []
    for model in models:
        told = _named(progress, model.name)
        ran.append((model, backtest.run_model(model, parts, progress=told)))
    policies = {}
    for number, policy in enumerate(every := registry.named_policies(), start=1):
        policies[policy.name] = backtest.run_policy(policy, parts)
        progress(policy.name, number, len(every))
    rows = [_model_row(forecasts, parts, reference) for _, forecasts in ran]
    rows += [_policy_row(name, outcome, parts, reference) for name, outcome in policies.items()]
    return Ran(parts, ran, policies, reference, _summary(trace, parts, rows))


def _named(progress: Progress, name: str) -> backtest.Progress:
    return lambda done, total: progress(name, done, total)


def _summary(trace: Trace, parts: Split, rows: list[Row]) -> Summary:
    cohorts = parts.cohorts()
    return Summary(
        trace.name,
        len(parts.past.history.names),
        len(parts.future.history.names),
        parts.tune_until,
        parts.counts.shape[1],
        {cohort: cohorts.count(cohort) for cohort in sorted(set(cohorts))},
        rows,
    )


def _model_row(forecasts: Forecasts, parts: Split, reference: Outcome) -> Row:
    counts, weights = parts.counts, parts.future.weights
    at = {}
    for share in COLD_SHARES:
        outcome = forecasts.at_threshold(forecasts.thresholds[share], counts)
        at[f"{share:g}"] = _decided(outcome, reference, weights)
    cost = {}
    for cold_cost in COLD_COSTS:
        outcome = forecasts.at_threshold(decisions.fixed_threshold(cold_cost), counts)
        cost[f"{cold_cost}"] = cost_ratio(outcome, reference, cold_cost, weights)
    losses = backtest.losses(forecasts, parts)
    cohorts = np.array(parts.cohorts())
    by_cohort = {
        str(cohort): _by_lead(losses[cohorts == cohort], weights[cohorts == cohort])
        for cohort in np.unique(cohorts)
    }
    happened = scores.arrivals_within(parts.future.history.counts, parts.report_from, LEADS[:1])
    made = scores.calibration(forecasts.p[..., 0].astype(np.float64), happened[..., 0], weights)
    return Row(forecasts.model, at, cost, _by_lead(losses, weights), by_cohort, made.error())


def _policy_row(name: str, outcome: Outcome, parts: Split, reference: Outcome) -> Row:
    weights = parts.future.weights
    cost = {f"{c}": cost_ratio(outcome, reference, c, weights) for c in COLD_COSTS}
    return Row(name, {"own": _decided(outcome, reference, weights)}, cost, {}, {}, None)


def _decided(outcome: Outcome, reference: Outcome, weights: Floats) -> Decided:
    return Decided(
        float(outcome.cold_share(weights)),
        float(outcome.idle_minutes(weights)),
        backtest.idle_ratio(outcome, reference, weights),
    )


def cost_ratio(outcome: Outcome, keep_alives: Outcome, cold_cost: int, weights: Floats) -> float:
    """To a keep-alive of `cold_cost` minutes, whose row in `keep_alives` is that of its length."""
    theirs = keep_alives.cost(cold_cost, weights)[cold_cost - 1]
    return float(outcome.cost(cold_cost, weights) / theirs) if theirs else float("nan")


def _by_lead(losses: Floats, weights: Floats) -> dict[str, float]:
    return {f"{lead}": mean_loss(losses[:, at], weights) for at, lead in enumerate(LEADS)}


def mean_loss(losses: Floats, weights: Floats) -> float:
    """Over the series whose loss is known."""
    known = ~np.isnan(losses)
    total = float(weights[known].sum())
    return float(losses[known] @ weights[known]) / total if total else float("nan")
