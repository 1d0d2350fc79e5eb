from __future__ import annotations

import pytest

from flashserve.config import AuthSettings, ServerSettings, Settings
from flashserve.errors import InputError
from flashserve.gateway.auth import check_binding, host_name
from flashserve.gateway.edge import is_over_unix_socket


def settings(host: str, **auth: tuple[str, ...]) -> Settings:
    return Settings.model_construct(server=ServerSettings(host=host), auth=AuthSettings(**auth))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_binding(settings(host))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "models.example.org", "*"])
def test_other_addresses_need_users_keys(host: str) -> None:
    with pytest.raises(InputError, match=r"auth\.api_keys"):
        check_binding(settings(host))
    with pytest.raises(InputError, match=r"auth\.api_keys"):
        check_binding(settings(host, admin_keys=("a",)))
    check_binding(settings(host, api_keys=("a",)))


@pytest.mark.parametrize(
    ("authority", "host"),
    [
        ("localhost", "localhost"),
        ("localhost:80", "localhost"),
        ("[::1]:80", "::1"),
        ("[::1]", "::1"),
        ("", ""),
        (":80", ""),
    ],
)
def test_the_host_is_told_from_its_port(authority: str, host: str) -> None:
    assert host_name(authority) == host


@pytest.mark.parametrize(
    ("server", "is_unix"),
    [(("/run/x.sock", None), True), (("127.0.0.1", 80), False), (("", 0), False), (None, False)],
)
def test_only_a_path_without_a_port_is_a_unix_socket(
    server: tuple[str, int | None] | None, is_unix: bool
) -> None:
    assert is_over_unix_socket({"server": server}) is is_unix
    assert is_over_unix_socket({}) is False
