"""A backtest as one HTML page that needs nothing else: tables, drawings, and how to read them."""

from __future__ import annotations

import jinja2

from flashserve.forecast import plots
from flashserve.forecast.summary import Ran, Row

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Backtest of {{ s.trace }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
svg { max-width: 100%; height: auto; }
</style>
<h1>Backtest of {{ s.trace }}</h1>
<p>Fitted on {{ s.num_fitted }} series and the first {{ s.fitted_minutes }} minutes, thresholds
included; reported on {{ s.num_reported }} series and the {{ s.reported_minutes }} minutes after a
history that no threshold saw. Series with an arrival a minute or more are left out.
Cohorts: {% for name, count in s.cohorts.items() %}{{ name }} {{ count }}{{ ", " if not loop.last }}
{%- endfor %}.</p>
<h2>Decisions</h2>
<p>A minute with arrivals in which the model is not warm is a cold start; a warm minute without
arrivals is idle. Idle ratios are to the fixed keep-alive with the same share of cold starts:
below 1 is better than any keep-alive. Cost ratios are to a keep-alive of as many minutes as a cold
start costs.</p>
{{ decisions }}
<h2>Distributions</h2>
<p>Log loss of "an arrival within so many minutes" (lower is better), over all series and by cohort,
and the mean distance between what was said and what came.</p>
{{ losses }}
{% for title, svg in drawings.items() %}
<h2>{{ title }}</h2>
{{ svg }}
{% endfor %}
</html>
"""

_TABLE = """<table><tr>{% for cell in head %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>"""


def page(ran: Ran) -> str:
    """Raises InputError where matplotlib is not installed."""
    environment = jinja2.Environment(autoescape=True)
    table = environment.from_string(_TABLE)
    markup = {
        "decisions": table.render(head=DECISION_COLUMNS, rows=decision_rows(ran.summary.rows)),
        "losses": table.render(head=LOSS_COLUMNS, rows=loss_rows(ran.summary.rows)),
    }
    drawings = plots.all_plots(ran, best_model(ran.summary.rows))
    safe = {title: _safe(svg) for title, svg in drawings.items()}
    tables = {name: _safe(text) for name, text in markup.items()}
    return environment.from_string(_PAGE).render(s=ran.summary, drawings=safe, **tables)


def _safe(text: str) -> object:
    """Markup that was escaped where it was made: by the template above, or by the drawer."""
    from markupsafe import Markup

    return Markup(text)  # noqa: S704


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


def decision_rows(rows: list[Row]) -> list[list[str]]:
    """One for each threshold of each model; what platforms do has no aim."""
    lines = []
    for row in rows:
        costs = [f"{ratio:.2f}" for ratio in row.cost.values()]
        for number, (aim, decided) in enumerate(row.at.items()):
            shown = "-" if aim == "own" else f"{float(aim):.0%}"
            figures = [shown, f"{decided.cold_share:.1%}", f"{decided.idle_ratio:.2f}"]
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
