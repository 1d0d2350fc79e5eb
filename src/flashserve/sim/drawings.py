"""Drawings of simulated policies, as SVG text. Needs matplotlib (extra `forecast`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from flashserve.forecast.pages import drawn
from flashserve.sim.figures import Figures, first_tokens
from flashserve.sim.results import Results
from flashserve.types import Tier

_TIER_COLOURS = {
    Tier.REMOTE: "#d9d9d9",
    Tier.DISK: "#9ecae1",
    Tier.DRAM: "#4292c6",
    Tier.DEVICE: "#e6550d",
}
_WORK_COLOURS = {"busy": "#31a354", "loading": "#fdae6b", "idle": "#bdbdbd"}
_MARKERS = "os^vDPX<>p*h"
_HOUR = 3600.0
_NUM_POINTS = 150
_NUM_SAMPLES = 200
_WIDE = (8.4, 3.4)
_LEAST_PART = 0.001
_LEAST_SPAN = 1.5


def frontier(found: Sequence[Figures], number_of_days: float, currency: str) -> Markup:
    """What a day costs against how long the slowest requests wait: lower left is better."""

    def draw(axes: Any) -> None:
        points = [
            (number, each.policy, each.costs.cost / number_of_days, each.answers.ttft_p99_s)
            for number, each in enumerate(found)
            if each.answers.ttft_p99_s is not None
        ]
        axes.set(xlabel=f"cost a day, {currency}", ylabel="p99 seconds to the first token")
        if not points:
            axes.set(title="every policy rejected over 1 % of the requests")
            return
        fixed = sorted(point[2:] for point in points if point[1].startswith("keep-alive-"))
        axes.plot(*np.array(fixed).reshape(-1, 2).T, "--", color="#999999", lw=1)
        for number, name, cost, waited in points:
            colour = f"C{number % 10}"
            axes.plot(cost, waited, _marker(number), color=colour, markersize=9, label=name)
        axes.set(xscale="log", yscale="log")
        axes.set(xlim=_wide_enough(*axes.get_xlim()), ylim=_wide_enough(*axes.get_ylim()))
        _plain_ticks(axes.xaxis)
        _plain_ticks(axes.yaxis)
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

    return drawn(draw, (8.4, 4.2), as_text=True)


def cold_shares(found: Sequence[Figures]) -> Markup:
    """Of each policy, the share of requests that waited for a start, by where the bytes were."""

    def draw(axes: Any) -> None:
        names = [each.policy for each in found]
        left = np.zeros(len(found))
        for tier, colour in _TIER_COLOURS.items():
            label = "already loading" if tier is Tier.DEVICE else tier.label
            requests = np.array([max(each.answers.requests, 1) for each in found])
            shares = 100 * np.array([each.cold_by_tier[tier.label] for each in found]) / requests
            if shares.any():
                axes.barh(names, shares, left=left, color=colour, label=label)
            left = left + shares
        for row, share in enumerate(left):
            axes.text(share, row, f" {share:.2g} %", va="center", fontsize="small")
        axes.set(xlabel="cold starts, % of requests", xlim=(0, max(left.max() * 1.15, 0.1)))
        axes.invert_yaxis()
        if axes.get_legend_handles_labels()[0]:
            axes.legend(
                title="bytes were in", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
            )

    return drawn(draw, (8.4, 1.2 + 0.32 * len(found)), as_text=True)


def on_device(all_results: Sequence[Results]) -> Markup:
    """How many models each policy has on a device, over time."""

    def draw(axes: Any) -> None:
        for number, results in enumerate(all_results):
            shown = _samples(results)
            at = results.timeline.at[shown] / _HOUR
            models = results.timeline.tiers[shown, Tier.DEVICE]
            axes.plot(
                at, models, color=f"C{number % 10}", ls=_style(number), lw=1.3, label=results.policy
            )
        axes.set(xlabel="hours", ylabel="models on a device", ylim=(0, None))
        _hours(axes.xaxis)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

    return drawn(draw, (8.4, 3.6), as_text=True)


def occupancy(results: Results) -> Markup:
    """How many models are at best in each tier, over time."""

    def draw(axes: Any) -> None:
        order = (Tier.DEVICE, Tier.DRAM, Tier.DISK, Tier.REMOTE)
        shown = _samples(results)
        axes.stackplot(
            results.timeline.at[shown] / _HOUR,
            *(results.timeline.tiers[shown, tier] for tier in order),
            labels=[tier.label for tier in order],
            colors=[_TIER_COLOURS[tier] for tier in order],
        )
        _finish(axes, results, "models by best tier")

    return drawn(draw, _WIDE, as_text=True)


def workers(results: Results) -> Markup:
    """What the workers do, over time."""

    def draw(axes: Any) -> None:
        line, shown = results.timeline, _samples(results)
        axes.stackplot(
            line.at[shown] / _HOUR,
            line.busy[shown],
            line.loading[shown],
            line.idle[shown],
            labels=list(_WORK_COLOURS),
            colors=list(_WORK_COLOURS.values()),
        )
        axes.axhline(results.num_workers, color="black", lw=0.8, ls=":", label="all")
        _finish(axes, results, "workers")

    return drawn(draw, _WIDE, as_text=True)


def _finish(axes: Any, results: Results, what: str) -> None:
    axes.set(xlabel="hours", ylabel=what, ylim=(0, None), xlim=(0, results.duration_s / _HOUR))
    _hours(axes.xaxis)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        fontsize="small",
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        reverse=True,
    )


def distribution(results: Results) -> Markup:
    """The share of requests whose first token took longer than so many seconds."""

    def draw(axes: Any) -> None:
        requests = results.requests
        shown = {
            "all": np.ones(len(requests.model), np.bool_),
            "cold starts": requests.is_cold,
            "warm": ~requests.is_cold & ~requests.is_rejected,
        }
        for label, chosen in shown.items():
            times = first_tokens(requests, chosen)
            if not len(times):
                continue
            left = 1 - np.arange(len(times)) / len(times)
            keep = np.unique(np.geomspace(1, len(times), _NUM_POINTS).astype(np.int64))
            keep = np.sort(np.unique([*(keep - 1), *(len(times) - keep)]))
            keep = keep[np.isfinite(times[keep])]
            axes.step(times[keep], left[keep], where="post", label=label)
        axes.axvline(1.0, color="black", lw=0.8, ls=":")
        axes.set(xscale="log", yscale="log", xlabel="seconds to the first token")
        axes.set(ylabel="% that took longer")
        _plain_ticks(axes.xaxis)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
        axes.grid(visible=True, alpha=0.25)
        axes.legend(fontsize="small")

    return drawn(draw, _WIDE, as_text=True)


def parts(found: Figures) -> Markup:
    """Mean seconds of each phase of a cold request's time to the first token, end to end.

    Those that nobody could see are left out.
    """

    def draw(axes: Any) -> None:
        left = 0.0
        least = _LEAST_PART * sum(found.cold_parts_s.values())
        for number, (name, seconds) in enumerate(found.cold_parts_s.items()):
            if seconds <= least:
                continue
            label = f"{name.removesuffix('_s')} {seconds:.3g} s"
            axes.barh([""], [seconds], left=left, color=f"C{number}", label=label)
            left += seconds
        axes.set(xlabel="seconds, mean of the cold requests")
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))

    return drawn(draw, (8.4, 1.7), as_text=True)


def _samples(results: Results) -> slice:
    """Of the timeline, no more than can be seen."""
    return slice(None, None, -(-len(results.timeline.at) // _NUM_SAMPLES) or 1)


def _wide_enough(low: float, high: float) -> tuple[float, float]:
    """Limits of a logarithmic axis on which a difference of a percent looks like one."""
    factor = max(1.0, (_LEAST_SPAN * low / high) ** 0.5)
    return low / factor, high * factor


def _plain_ticks(axis: Any) -> None:
    """A logarithmic axis labelled 0.5, 1, 2, 5 rather than by powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _hours(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 3, 6, 10]))


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]


def _style(number: int) -> str:
    return ("-", "--", ":")[number // 10 % 3]
