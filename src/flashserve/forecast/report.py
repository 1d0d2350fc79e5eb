"""A backtest as one HTML page that needs nothing else: tables, drawings, and how to read them."""

from __future__ import annotations

import math

from flashserve.forecast import pages, plots
from flashserve.forecast.summary import Ran, Row

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Backtest of {{ s.trace }}</title>
<style>{{ style }}</style>
<h1>Backtest of {{ s.trace }}</h1>
<p class="short">{{ short }}</p>
<p>Fitted on {{ s.num_fitted }} series and the first {{ s.fitted_minutes }} minutes, thresholds
included; reported on {{ s.num_reported }} series and the {{ s.reported_minutes }} minutes after a
history that no threshold saw. Series with an arrival a minute or more are left out.
Cohorts: {% for name, count in s.cohorts.items() %}{{ name }} {{ count }}{{ ", " if not loop.last }}
{%- endfor %}.</p>
<h2>Decisions</h2>
<p>A minute with arrivals in which the model is not warm is a cold start; a warm minute without
arrivals is idle. Idle ratios are to the fixed keep-alive with the same share of cold starts:
below 1 is better than any keep-alive. Cost ratios are to a keep-alive of as many minutes as a cold
start costs. Ratios of 0.95 and less are green.</p>
{{ decisions }}
<h2>Distributions</h2>
<p>Log loss of "an arrival within so many minutes" (lower is better), over all series and by cohort,
and the mean distance between what was said and what came.</p>
{{ losses }}
{% for drawing in drawings %}
<h2>{{ drawing.title }}</h2>
<p>{{ drawing.reading }}</p>
{{ drawing.svg }}
{% endfor %}
</html>
"""


def page(ran: Ran) -> str:
    """Raises InputError where matplotlib is not installed."""
    rows = ran.summary.rows
    values = {
        "s": ran.summary,
        "style": pages.STYLE,
        "short": in_short(rows),
        "decisions": pages.table(
            _DECISION_HEADINGS, decision_rows(rows), ratios=range(3, len(DECISION_COLUMNS))
        ),
        "losses": pages.table(_LOSS_HEADINGS, loss_rows(rows)),
        "drawings": plots.all_plots(ran, best_model(rows)),
    }
    return pages.render(_PAGE, values)


def in_short(rows: list[Row]) -> str:
    """What the tables say, in one line: the best forecaster against the best keep-alive."""
    best = next(row for row in rows if row.name == best_model(rows))
    aim, decided = next(iter(best.at.items()))
    idle, cost = decided.idle_ratio, best.cost["30"]
    idle_said = (
        "as seldom as with no fixed keep-alive"
        if math.isnan(idle)
        else f"with {_against(idle, 'the idle time')} of the fixed keep-alive that is cold as often"
    )
    return (
        f"{best.name} forecasts best. Where {float(aim):.0%} cold starts were aimed at, "
        f"{decided.cold_share:.1%} were cold, {idle_said}. Where a cold start costs 30 idle "
        f"minutes, it takes {_against(cost, 'the cost')} of a keep-alive of 30 minutes."
    )


def _against(ratio: float, what: str) -> str:
    return f"{ratio:.0%} of {what}"


def best_model(rows: list[Row]) -> str:
    """That with the least log loss of an arrival in the next minute."""
    losses = {row.name: row.log_loss["1"] for row in rows if row.log_loss}
    return min(losses, key=lambda name: losses[name])


DECISION_COLUMNS = [
    "model",
    "aim_cold",
    "cold",
    "idle_ratio",
    "cost_5",
    "cost_10",
    "cost_30",
    "cost_60",
]
LOSS_COLUMNS = ["model", "cohort", "loss_1", "loss_5", "loss_10", "loss_30", "calibration_error"]
_DECISION_HEADINGS = [
    "forecaster or policy",
    "cold starts aimed at",
    "cold starts",
    "idle time, ratio",
    *(f"cost if a cold start costs {minutes} min, ratio" for minutes in (5, 10, 30, 60)),
]
_LOSS_HEADINGS = [
    "forecaster",
    "cohort",
    *(f"log loss, {minutes} min" for minutes in (1, 5, 10, 30)),
    "calibration error",
]


def decision_rows(rows: list[Row]) -> list[list[str]]:
    """One for each threshold of each model; what platforms do has no aim."""
    lines = []
    for row in rows:
        costs = [f"{ratio:.2f}" for ratio in row.cost.values()]
        for number, (aim, decided) in enumerate(row.at.items()):
            shown = "-" if aim == "own" else f"{float(aim):.0%}"
            idle = "-" if math.isnan(decided.idle_ratio) else f"{decided.idle_ratio:.2f}"
            figures = [shown, f"{decided.cold_share:.1%}", idle]
            # The costs are those of thresholds of their own: said once.
            lines.append([row.name, *figures, *(costs if number == 0 else [""] * len(costs))])
    return lines


def loss_rows(rows: list[Row]) -> list[list[str]]:
    lines = []
    for row in rows:
        if not row.log_loss or row.calibration_error is None:
            continue
        losses = [f"{loss:.4f}" for loss in row.log_loss.values()]
        lines.append([row.name, "all", *losses, f"{row.calibration_error:.4f}"])
        for cohort, by_lead in row.log_loss_by_cohort.items():
            lines.append([row.name, cohort, *(f"{loss:.4f}" for loss in by_lead.values()), ""])
    return lines
