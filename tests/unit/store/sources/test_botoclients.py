import os
from pathlib import Path

import pytest

from flashserve.config import StoreSettings
from flashserve.store.sources.botoclients import Clients, Shared

SETTINGS = StoreSettings()


class FakeClient:
    def __init__(self) -> None:
        self.num_closed = 0

    def close(self) -> None:
        self.num_closed += 1


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


@pytest.fixture
def made() -> list[tuple[int, float]]:
    return []


@pytest.fixture
def clients(made) -> Clients:
    def make(retries: int, timeout_s: float) -> Shared:
        made.append((retries, timeout_s))
        return Shared(FakeClient(), None)

    return Clients(make)


def client_of(clients: Clients, **settings) -> FakeClient:
    with clients.using(SETTINGS.model_copy(update=settings)) as shared:
        return shared.client


def test_one_client_serves_all_who_ask_alike(clients, made):
    first = client_of(clients)
    assert client_of(clients) is first
    assert client_of(clients, remote_retries=1) is not first
    assert made == [(SETTINGS.remote_retries, 10.0), (1, 10.0)]


def test_the_last_user_closes_idle_connections(clients):
    with clients.using(SETTINGS) as shared:
        client_of(clients)
        assert shared.client.num_closed == 0
    assert shared.client.num_closed == 1


def test_another_environment_gets_another_client(clients, monkeypatch):
    first = client_of(clients)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    second = client_of(clients)
    assert second is not first
    monkeypatch.setenv("UNRELATED", "x")
    assert client_of(clients) is second


def test_credentials_that_were_written_anew_are_read(clients, home, monkeypatch):
    first = client_of(clients)
    (home / "credentials").write_text("[default]\n")
    second = client_of(clients)
    assert second is not first
    monkeypatch.setenv("AWS_CONFIG_FILE", str(home / "mine"))
    third = client_of(clients)
    (home / "mine").write_text("[default]\n")
    assert client_of(clients) not in {first, second, third}


def test_a_client_that_is_outdated_while_it_is_used_is_closed_by_its_user(clients, monkeypatch):
    with clients.using(SETTINGS) as old:
        monkeypatch.setenv("AWS_PROFILE", "other")
        client_of(clients)
        assert old.client.num_closed == 0
    assert old.client.num_closed == 1


def test_a_client_that_cannot_be_made_is_tried_again(made):
    def make(retries: int, timeout_s: float) -> Shared:
        made.append((retries, timeout_s))
        if len(made) == 1:
            raise ValueError("bad profile")
        return Shared(FakeClient(), None)

    clients = Clients(make)
    with pytest.raises(ValueError, match="profile"):
        client_of(clients)
    client_of(clients)
    assert len(made) == 2
