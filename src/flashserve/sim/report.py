"""Simulated policies as one HTML file that needs nothing else, with a page for each policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from flashserve.forecast import pages
from flashserve.forecast.traces import DAY
from flashserve.policy import text
from flashserve.policy.cost import Prices
from flashserve.sim import drawings
from flashserve.sim.figures import Answers, Costs, Figures
from flashserve.sim.results import Decided, Results

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Simulation of {{ about.workload }}</title>
<style>{{ style }}
nav { position: sticky; top: 0; background: #fff; padding: .5rem 0; border-bottom: 1px solid #ddd; }
nav a { margin-right: 1rem; white-space: nowrap; }
body { max-width: 68rem; }
table { font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .55rem; }
td:first-child { white-space: nowrap; }
.wide { overflow-x: auto; }
.reasons td { text-align: left; vertical-align: top; white-space: nowrap; }
.reasons td:last-child { white-space: normal; }
.reasons th { text-align: left; }
section.policy { scroll-margin-top: 100vh; }
@media screen {
  section.policy { display: none; }
  section.policy:target { display: block; }
  main:has(section.policy:target) #overview { display: none; }
}
</style>
<h1>Simulation of {{ about.workload }}</h1>
<p>{{ about.text }} Prices: {{ prices }}.</p>
<nav><a href="#overview">all policies</a>
{% for page in policies %}<a href="#{{ page.anchor }}">{{ page.name }}</a>
{% endfor %}</nav>
<main>
<section id="overview">
<h2>What each policy costs, and how long its requests wait</h2>
<p>A policy is better the further it is to the lower left: it costs less, and its slowest requests
wait less; one that rejected over 1 % of its requests is not shown. The oracle knows every arrival
ahead.</p>
{{ frontier }}
<div class="wide">{{ answers }}</div>
<p>cold: requests that waited for a start. under 1 s: of all requests; one that was rejected counts
as late. Hours are of workers; idle cost is of workers that were held without a request, idle or
loading; cost is of all that was held, with the bytes in DRAM and on disk.</p>
<h2>Cold starts, and where the bytes were</h2>
{{ cold }}
<h2>Models on a device, over time</h2>
{{ on_device }}
<h2>By kind of traffic</h2>
<p>Kinds are told from each model's own arrivals: rare (under 20 minutes with arrivals), timer
(equal gaps), diurnal (follows the hour of the day), bursty (the rest), llm (clients of a language
model).</p>
{% for heading, table in cohorts.items() %}
<h3>{{ heading }}</h3>
<div class="wide">{{ table }}</div>
{% endfor %}
</section>
{% for page in policies %}
<section class="policy" id="{{ page.anchor }}">
<h2>{{ page.name }}</h2>
<div class="wide">{{ page.answers }}</div>
<h3>Where models are</h3>
{{ page.occupancy }}
<h3>What workers do</h3>
{{ page.workers }}
<h3>Time to the first token</h3>
{{ page.distribution }}
{% if page.parts %}
<h3>What cold requests wait for</h3>
{{ page.parts }}
{% endif %}
<h3>By kind of traffic</h3>
<div class="wide">{{ page.cohorts }}</div>
<h3>Why</h3>
<p>Orders to nodes: {{ page.orders }}. A sample, in order of time:</p>
<div class="wide reasons">{{ page.reasons }}</div>
</section>
{% endfor %}
</main>
</html>
"""

COLUMNS = [
    "policy",
    "cold",
    "p50_s",
    "p95_s",
    "p99_s",
    "under_1s",
    "rejected",
    "busy_h",
    "idle_h",
    "idle_cost",
    "cost",
]
_REASONS_PER_VERB = 12


@dataclasses.dataclass(frozen=True, slots=True)
class About:
    """What was simulated: the workload's name, and all else in sentences."""

    workload: str
    text: str


def page(ran: Sequence[tuple[Results, Figures]], about: About, prices: Prices) -> str:
    """Raises InputError where matplotlib is not installed."""
    found = [figures for _, figures in ran]
    days = ran[0][0].duration_s / (DAY * 60)
    cohorts = sorted({cohort for each in found for cohort in each.cohorts})
    values = {
        "style": pages.STYLE,
        "about": about,
        "prices": priced(prices),
        "frontier": drawings.frontier(found, days, prices.currency),
        "answers": pages.table(COLUMNS, rows(found)),
        "cold": drawings.cold_shares(found),
        "on_device": drawings.on_device([results for results, _ in ran]),
        "cohorts": {
            _cohort_heading(found, cohort): _cohort_table(found, cohort) for cohort in cohorts
        },
        "policies": [_policy(results, figures) for results, figures in ran],
    }
    return pages.render(_PAGE, values)


def priced(prices: Prices) -> str:
    return (
        f"in {prices.currency}, a worker ({prices.worker_text}) {prices.gpu_per_s * 3600:.4g} an "
        f"hour, a GB in DRAM {prices.dram_gb_per_s * 3600:.4g}, on disk "
        f"{prices.disk_gb_per_s * 3600:.4g}"
    )


def rows(found: Iterable[Figures]) -> list[list[str]]:
    """One for each policy, under COLUMNS."""
    return [row(each.policy, each.answers, each.costs) for each in found]


def row(name: str, answers: Answers, costs: Costs) -> list[str]:
    times = (answers.ttft_p50_s, answers.ttft_p95_s, answers.ttft_p99_s)
    return [
        name,
        f"{answers.cold_share:.2%}",
        *("-" if time is None else f"{time:.2f}" for time in times),
        f"{answers.under_1s:.2%}",
        f"{answers.rejected}",
        f"{costs.busy_h:.1f}",
        f"{costs.idle_h:.1f}",
        text.money(costs.idle_cost),
        text.money(costs.cost),
    ]


def _cohort_table(found: Sequence[Figures], cohort: str) -> Markup:
    lines = [
        row(each.policy, of.answers, of.costs) for each in found if (of := each.cohorts.get(cohort))
    ]
    return pages.table(COLUMNS, lines)


def _cohort_heading(found: Sequence[Figures], cohort: str) -> str:
    """With what is the same for all policies."""
    of = next(each.cohorts[cohort] for each in found if cohort in each.cohorts)
    models, requests = text.count(of.models, "model"), text.count(of.answers.requests, "request")
    return f"{cohort}: {models}, {requests}"


def _policy(results: Results, figures: Figures) -> dict[str, object]:
    cohorts = [
        [*row(cohort, of.answers, of.costs), f"{of.models}", f"{of.answers.requests}"]
        for cohort, of in figures.cohorts.items()
    ]
    orders = ", ".join(f"{verb} {number}" for verb, number in figures.commands.items())
    return {
        "name": figures.policy,
        "anchor": f"policy-{figures.policy}",
        "answers": pages.table(COLUMNS, rows([figures])),
        "occupancy": drawings.occupancy(results),
        "workers": drawings.workers(results),
        "distribution": drawings.distribution(results),
        "parts": drawings.parts(figures) if figures.cold_parts_s else "",
        "cohorts": pages.table(["cohort", *COLUMNS[1:], "models", "requests"], cohorts),
        "orders": orders or "none",
        "reasons": pages.table(
            ["time", "order", "model", "node", "reason"],
            [_reason(each) for each in sample(results.decisions)],
        ),
    }


def sample(decisions: Sequence[Decided], per_verb: int = _REASONS_PER_VERB) -> list[Decided]:
    """Some of each verb, spread over the time, in order of time."""
    by_verb: dict[str, list[Decided]] = {}
    for each in decisions:
        by_verb.setdefault(each.verb, []).append(each)
    chosen = []
    for of_verb in by_verb.values():
        step = max(1.0, len(of_verb) / per_verb)
        chosen += [of_verb[int(number * step)] for number in range(min(per_verb, len(of_verb)))]
    return sorted(chosen, key=lambda each: each.at)


def _reason(each: Decided) -> list[str]:
    return [clock(each.at), each.verb, each.model_id, each.node_id, each.reason]


def clock(at: float) -> str:
    """Seconds since the start as hours, minutes and seconds."""
    hours, rest = divmod(at, 3600)
    return f"{int(hours):02}:{int(rest // 60):02}:{rest % 60:04.1f}"
