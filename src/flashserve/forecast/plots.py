"""Drawings of a backtest, as SVG text. Needs matplotlib (extra `forecast`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from markupsafe import Markup

from flashserve.forecast import backtest, decisions, scores
from flashserve.forecast.backtest import LEADS, Forecasts
from flashserve.forecast.core import QUANTILE_LEVELS, ArrivalModel, History
from flashserve.forecast.pages import drawn, drawn_figure
from flashserve.forecast.summary import Ran
from flashserve.forecast.traces import DAY

_FAN_LEADS = tuple(range(1, 61))
_COMPONENT_STEP = 5
_SHOWN_MINUTES = 480
_COLD_COST = 30
_CHANCE = "hazard"


@dataclasses.dataclass(frozen=True, slots=True)
class Drawing:
    """One figure: what it is about, how to read it, and the drawing as SVG text."""

    title: str
    reading: str
    svg: Markup


def all_plots(ran: Ran, best: str) -> list[Drawing]:
    """best: the model whose forecasts are shown where one is.

    Raises:
        InputError: matplotlib is not installed.
    """
    model, forecasts = next(pair for pair in ran.models if pair[0].name == best)
    example = _example(ran)
    name = ran.parts.future.history.names[example][:24]
    return [
        Drawing(
            "Cost frontier: what few cold starts cost in idle time",
            "Each curve is one forecaster at all its thresholds; each dot is a policy without any. "
            "Further down and to the left is better: fewer cold starts for less idle time.",
            drawn(lambda axes: _frontier(axes, ran)),
        ),
        Drawing(
            f"Reliability: do the chances of {best} come true?",
            "On the dotted line, what was called a chance of 40 % came in 40 % of the cases. Below "
            "it, too much was promised; above it, too little. Dots hold equal shares of minutes.",
            drawn(lambda axes: _reliability(axes, ran, forecasts)),
        ),
        Drawing(
            f"Hazard: the chance of an arrival against the age since the last one ({best})",
            "Peaks are timers. Above the dashed line it is cheaper to keep the model warm for the "
            "coming minute, below it to let it go: that is the whole decision.",
            drawn(lambda axes: _hazard(axes, ran, forecasts)),
        ),
        Drawing(
            f"Fan: the next hour of one series ({name}), as {best} saw it",
            "Arrivals until each minute ahead. The black steps are what came; they should leave "
            "the dark band in one of five cases. The series is the median one by busy minutes.",
            drawn(lambda axes: _fan(axes, ran, model, example)),
        ),
        Drawing(
            f"Components: what the forecasts of {best} for this series are made of",
            "Trend, day and week are arrivals a minute that the past days tell; the residual is "
            "what the model adds to them (all of it, until two days are known). The hazard is the "
            "chance of an arrival in the minute.",
            drawn_figure(lambda figure: _components(figure, ran, model, example)),
        ),
    ]


def _example(ran: Ran) -> int:
    """The series with the median number of busy minutes, of those with any in the report."""
    busy = (ran.parts.counts > 0).sum(axis=1)
    order = np.argsort(busy, kind="stable")
    order = order[busy[order] > 0] if (busy > 0).any() else order
    return int(order[len(order) // 2])


def _frontier(axes: Any, ran: Ran) -> None:
    weights = ran.parts.future.weights
    days = weights.sum() * ran.parts.counts.shape[1] / DAY
    for _, forecasts in ran.models:
        outcome = backtest.frontier(forecasts, ran.parts)
        axes.plot(*_curve(outcome, weights, days), label=forecasts.model)
    curve = _curve(ran.keep_alives, weights, days)
    axes.plot(*curve, "k--", label="fixed keep-alives")
    for name, outcome in ran.policies.items():
        axes.plot(
            100 * float(outcome.cold_share(weights)),
            float(outcome.idle_minutes(weights)) / days,
            "o",
            label=name,
        )
    axes.set(xlim=(0, 25), xlabel="cold starts, % of minutes with arrivals")
    axes.set(ylabel="idle minutes a series and day", ylim=(0, None))
    axes.legend(fontsize="small")


def _curve(outcome: Any, weights: Any, days: float) -> tuple[Any, Any]:
    shares, minutes = decisions.lower_hull(
        outcome.cold_share(weights), outcome.idle_minutes(weights)
    )
    return 100 * shares, minutes / days


def _reliability(axes: Any, ran: Ran, forecasts: Forecasts) -> None:
    counts, weights = ran.parts.future.history.counts, ran.parts.future.weights
    happened = scores.arrivals_within(counts, ran.parts.report_from, LEADS)
    for number, lead in enumerate(LEADS):
        p = forecasts.p[..., number].astype(np.float64)
        made = scores.calibration(p, happened[..., number], weights)
        axes.plot(made.said, made.came, "o-", markersize=3, label=f"{lead} min")
    axes.plot([0, 1], [0, 1], "k:", label="as said")
    axes.set(xlabel="chance that was said", ylabel="how often it came")
    axes.legend(fontsize="small", title="within")


def _hazard(axes: Any, ran: Ran, forecasts: Forecasts) -> None:
    ages = decisions.ages_before(ran.parts.future.history.counts, ran.parts.report_from)
    longest = min(int(ages.max(initial=1)), 120)
    weights = np.broadcast_to(ran.parts.future.weights[:, None], ages.shape)
    used = (ages > 0) & (ages <= longest) & ~np.isnan(ran.parts.counts)
    heavy = np.bincount(ages[used], weights[used], longest + 1)[1:]
    came = np.bincount(ages[used], (weights * (ran.parts.counts > 0))[used], longest + 1)[1:]
    said = np.bincount(ages[used], (weights * forecasts.p[..., 0])[used], longest + 1)[1:]
    at = np.arange(1, longest + 1)
    heavy = np.where(heavy > 0, heavy, np.nan)
    axes.plot(at, came / heavy, ".", label="came in the next minute")
    axes.plot(at, said / heavy, label="said on average")
    line = decisions.fixed_threshold(_COLD_COST)
    label = f"warm above this, if a cold start costs {_COLD_COST} idle minutes"
    axes.axhline(line, color="black", linestyle="--", label=label)
    axes.set(xlabel="minutes since the last arrival", ylabel="chance a minute", yscale="log")
    axes.legend(fontsize="small")


def _fan(axes: Any, ran: Ran, model: ArrivalModel, example: int) -> None:
    history = _row(ran, example)
    counts = history.counts[0]
    last = max(ran.parts.report_from, len(counts) - max(_FAN_LEADS))
    busy = np.flatnonzero(counts[ran.parts.report_from : last] > 0)
    origin = ran.parts.report_from + (int(busy[len(busy) // 2]) + 1 if busy.size else 0)
    quantiles = model.predict(history.before(history.start + origin), _FAN_LEADS).quantiles[0]
    for high, shade in ((3, 0.15), (2, 0.3)):
        label = f"{QUANTILE_LEVELS[0]:.0%} to {QUANTILE_LEVELS[high]:.0%}"
        axes.fill_between(
            _FAN_LEADS, quantiles[:, 0], quantiles[:, high], alpha=shade, color="C0", label=label
        )
    axes.plot(_FAN_LEADS, quantiles[:, 1], "C0", label="median")
    came = np.cumsum(np.nan_to_num(counts[origin : origin + len(_FAN_LEADS)]))
    axes.step(np.arange(1, len(came) + 1), came, "k", where="post", label="came")
    axes.set(xlabel="minutes ahead", ylabel=f"arrivals of {history.names[0][:24]} until then")
    axes.legend(fontsize="small")


def _components(figure: Any, ran: Ran, model: ArrivalModel, example: int) -> None:
    """Rates above, chances below: they have no unit in common."""
    history = _row(ran, example)
    shown = history.before(history.start + ran.parts.report_from + _SHOWN_MINUTES)
    hours: list[float] = []
    paths: dict[str, list[float]] = {}
    said = backtest.forecasts_from(
        model, shown, ran.parts.report_from, LEADS[:1], step=_COMPONENT_STEP
    )
    for column, prediction in said:
        hours.append(column / 60)
        for name, values in (prediction.components or {"rate": prediction.mean[:, 0]}).items():
            paths.setdefault(name, []).append(float(values[0]))
    rates = {name: path for name, path in paths.items() if name != _CHANCE}
    panels = [(rates, "arrivals a minute")] if rates else []
    if _CHANCE in paths:
        panels.append(({_CHANCE: paths[_CHANCE]}, "chance a minute"))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (parts, label) in zip(grid, panels, strict=True):
        for name, path in parts.items():
            axes.plot(hours, path, label=name)
        axes.set(ylabel=label)
        axes.legend(fontsize="small")
    grid[-1].set(xlabel="hours since the trace began")


def _row(ran: Ran, example: int) -> History:
    history = ran.parts.future.history
    return History((history.names[example],), history.start, history.counts[[example]])
