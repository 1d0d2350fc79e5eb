from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest
from tests.integration.gateway.fakes import FakeService, Running, running

from flashserve.config import AuthSettings, ServerSettings, Settings, TenantSettings


def make_settings(
    *,
    server: dict[str, object] | None = None,
    tenants: dict[str, TenantSettings] | None = None,
    **auth: object,
) -> Settings:
    return Settings.model_construct(
        server=ServerSettings(**(server or {})), auth=AuthSettings(**auth), tenants=tenants or {}
    )


Start = Callable[..., Running]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts servers with settings of the test's choice; all stop at its end."""
    import contextlib

    with contextlib.ExitStack() as stack:

        def begin(**options: object) -> Running:
            settings = make_settings(**options)
            return stack.enter_context(running(FakeService(), settings, tmp_path))

        yield begin


@pytest.fixture(scope="session")
def _default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(FakeService(), make_settings(), tmp_path_factory.mktemp("gateway")) as it:
        yield it


@pytest.fixture
def server(_default_server: Running) -> Running:
    """A server with default settings, one for all tests; its service is like new."""
    _default_server.service.reset()
    return _default_server


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as it:
        yield it
