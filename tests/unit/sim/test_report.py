from __future__ import annotations

from tests.unit.sim import made

from flashserve.policy.cost import Prices
from flashserve.sim import report
from flashserve.sim.figures import figures

ABOUT = report.About("a <trace>", "two models & six requests.")


def page(*policies: str) -> str:
    runs = [made.results(policy) for policy in policies]
    return report.page([(run, figures(run, Prices())) for run in runs], ABOUT, Prices())


def test_a_page_needs_nothing_else_and_has_a_page_for_each_policy() -> None:
    text = page("keep-alive-60s", "keep-alive-600s")
    assert text.count('<section class="policy"') == 2
    assert '<a href="#policy-keep-alive-600s">' in text
    assert text.count("<svg") == 3 + 2 * 4
    assert "src=" not in text
    assert "@import" not in text


def test_what_names_and_reasons_say_is_text_and_no_markup() -> None:
    text = page("made")
    assert "a &lt;trace&gt;" in text
    assert "because &lt;3&gt;" in text
    assert "two models &amp; six requests." in text


def test_each_kind_of_traffic_is_headed_by_what_is_the_same_for_all_policies() -> None:
    text = page("keep-alive-60s", "keep-alive-600s")
    assert text.count("<h3>rare: 1 model, 2 requests</h3>") == 1
    assert text.count("<h3>bursty: 1 model, 4 requests</h3>") == 1


def test_phases_that_nobody_could_see_are_not_drawn() -> None:
    run = made.results()
    assert run.requests.phases is not None
    run.requests.phases[1:3, 0] = 1e-13
    text = report.page([(run, figures(run, Prices()))], ABOUT, Prices())
    assert "dram 1.5 s" in text
    assert "queue " not in text


def test_figures_stand_in_the_table() -> None:
    [row] = report.rows([figures(made.results(), Prices())])
    shown = dict(zip(report.COLUMNS, row, strict=True))
    assert shown["cold"] == "33.33%"
    assert (shown["p50_s"], shown["p99_s"], shown["rejected"]) == ("1.40", "-", "1")


def test_reasons_are_a_sample_of_each_order_over_the_whole_time() -> None:
    chosen = report.sample(made.results().decisions, per_verb=5)
    assert [each.verb for each in chosen].count("start") == 5
    assert [each.verb for each in chosen].count("stop") == 5
    times = [each.at for each in chosen]
    assert times == sorted(times)
    assert times[-1] > 1800
    assert report.clock(3723.4) == "01:02:03.4"
