from __future__ import annotations

import json

import pytest

from flashserve.config import load_settings
from flashserve.errors import InputError


@pytest.fixture(autouse=True)
def no_file(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("FLASHSERVE_DATA_DIR", str(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("gpu_per_hour", "0"),
        ("gpu_per_hour", "nan"),
        ("dram_gb_per_hour", "-0.1"),
        ("disk_gb_per_hour", "inf"),
        ("wait_per_s", "-1"),
        ("slo_miss", "nan"),
        ("slo_s", "0"),
    ],
)
def test_a_price_that_is_none_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setenv(f"FLASHSERVE_PRICE__{setting.upper()}", value)
    with pytest.raises(InputError, match=rf"^setting price\.{setting}: "):
        load_settings()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("policy.keep_alive_s", "inf"),
        ("policy.deadline_s", "inf"),
        ("server.grace_period_s", "nan"),
        ("store.recheck_s", "1e999"),
        ("node.num_workers", "100000"),
        ("node.num_workers", "0"),
    ],
)
def test_a_number_without_sense_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, setting: str, value: str
) -> None:
    monkeypatch.setenv(f"FLASHSERVE_{setting.replace('.', '__').upper()}", value)
    with pytest.raises(InputError, match=rf"^setting {setting}: Input should be "):
        load_settings()


def test_an_unknown_time_zone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("Mars/Olympus", "../etc/passwd", ""):
        monkeypatch.setenv("FLASHSERVE_SCALING__TIMEZONE", name)
        with pytest.raises(InputError, match=r"^setting scaling\.timezone: .*Europe/Berlin"):
            load_settings()


@pytest.mark.parametrize(
    ("tenants", "says"),
    [
        ({"a b": {}}, r"^setting tenants\.a b"),
        ({"default": {}}, r"^tenants\.default is who has no name"),
        ({"a": {"weight": 0}}, r"^setting tenants\.a\.weight: "),
        ({"a": {"weights": 1}}, r"^setting tenants\.a\.weights: "),
        ({"a": {"keys": [""]}}, r"^tenants\.a\.keys holds an empty key"),
        ({"a": {"keys": ["s3"]}, "b": {"keys": ["s3"]}}, r"a\.keys and tenants\.b\.keys hold the"),
        ({"a": {"keys": ["user"]}}, r"^auth\.api_keys and tenants\.a\.keys hold the same key"),
    ],
)
def test_tenants_that_make_no_sense_are_refused_without_their_keys(
    monkeypatch: pytest.MonkeyPatch, tenants: dict[str, object], says: str
) -> None:
    monkeypatch.setenv("FLASHSERVE_AUTH__API_KEYS", '["user"]')
    monkeypatch.setenv("FLASHSERVE_TENANTS", json.dumps(tenants))
    with pytest.raises(InputError, match=says) as refused:
        load_settings()
    assert "s3" not in refused.value.message


def test_tenants_have_keys_and_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSERVE_TENANTS", '{"acme": {"keys": ["k"], "weight": 2}, "labs": {}}')
    settings = load_settings()
    assert settings.users_need_key
    assert settings.tenant_weights == {"acme": 2.0, "labs": 1.0}


def test_another_currency_needs_prices_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSERVE_PRICE__CURRENCY", "EUR")
    monkeypatch.setenv("FLASHSERVE_PRICE__DRAM_GB_PER_HOUR", "0.004")
    with pytest.raises(
        InputError, match=r"^setting price: in EUR, also set gpu_per_hour, disk_gb_per_hour"
    ):
        load_settings()
    monkeypatch.setenv("FLASHSERVE_PRICE__GPU_PER_HOUR", "2.5")
    monkeypatch.setenv("FLASHSERVE_PRICE__DISK_GB_PER_HOUR", "0.0001")
    assert load_settings().price.currency == "EUR"


def test_prices_can_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHSERVE_PRICE__GPU_PER_HOUR", "1.5")
    assert load_settings().price.gpu_per_hour == 1.5
