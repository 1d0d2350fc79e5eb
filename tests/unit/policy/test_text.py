from __future__ import annotations

import pytest

from flashserve.policy import text


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0, "0.00 s"), (0.123, "0.12 s"), (1.94, "1.9 s"), (299.6, "300 s")]
)
def test_seconds(value: float, shown: str) -> None:
    assert text.seconds(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (2048, "2.0 kB"),
        (269_060_552, "269 MB"),
        (1_240_000_000, "1.2 GB"),
        (3.2e13, "32.0 TB"),
    ],
)
def test_sizes(value: float, shown: str) -> None:
    assert text.size(value) == shown


def test_counts() -> None:
    assert text.count(1, "replica") == "1 replica"
    assert text.count(0, "replica") == "0 replicas"


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234.5, "1234.50"),
        (-8.333, "-8.33"),
        (0.996, "1.00"),
        (0.0834, "0.083"),
        (-0.0042, "-0.0042"),
        (0.00006, "0.0001"),
        (-0.00003, "0.00"),
        (0.0, "0.00"),
    ],
)
def test_money(value: float, shown: str) -> None:
    assert text.money(value) == shown
