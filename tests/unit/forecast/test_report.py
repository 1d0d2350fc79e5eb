"""What a backtest says where there is nothing to compare with."""

from __future__ import annotations

import math

from flashserve.forecast import pages, report
from flashserve.forecast.summary import Decided, Row


def row_of(idle_ratio: float) -> Row:
    cost = dict.fromkeys(("5", "10", "30", "60"), 0.9)
    return Row("hazard", {"0.05": Decided(0.01, 500.0, idle_ratio)}, cost, {"1": 0.1}, {}, 0.0)


def test_no_ratio_is_a_dash_and_no_success() -> None:
    rows = [row_of(math.nan)]
    [line] = report.decision_rows(rows)
    assert line[:4] == ["hazard", "5%", "1.0%", "-"]
    assert "1.0% were cold, as seldom as with no fixed keep-alive." in report.in_short(rows)
    assert str(pages.table(["ratio"], [["-"]], ratios=[0])).count("better") == 0


def test_a_ratio_is_said_as_a_share() -> None:
    rows = [row_of(0.5)]
    assert report.decision_rows(rows)[0][3] == "0.50"
    assert "with 50% of the idle time of the fixed keep-alive" in report.in_short(rows)
