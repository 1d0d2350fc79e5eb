"""Who may ask what: keys, hosts, origins, and the private socket."""

from __future__ import annotations

from collections.abc import AsyncIterator

import httpx
import openai
import pytest
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.fakes import MODEL, Running, greet

from flashserve.config import TenantSettings
from flashserve.live.requests import GenerationRequest, TextChunk
from flashserve.policy.schedules import NO_BOUNDS

USER = {"Authorization": "Bearer user-key"}
ADMIN = {"Authorization": "Bearer admin-key"}
KEYS = {"api_keys": ("user-key", "second-key"), "admin_keys": ("admin-key",)}
ADMIN_PATHS = ["/admin/v1/models", "/admin/v1/decisions", "/metrics", "/openapi.json"]
DEPLOYMENT = {"name": "new", "source": "demo:smollm2"}


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_without_keys_a_loopback_server_is_open(server: Running) -> None:
    with server.client() as http:
        for path in ["/v1/models", *ADMIN_PATHS]:
            assert http.get(path).status_code == 200, path


def test_users_keys_open_inference_and_nothing_else(start: Start) -> None:
    with start(**KEYS).client() as http:
        assert http.get("/v1/models", headers=USER).status_code == 200
        for path in ADMIN_PATHS:
            assert code_of(http.get(path, headers=USER)) == (403, "forbidden"), path
            assert code_of(http.get(path)) == (401, "invalid_api_key"), path
        reply = http.post("/admin/v1/models", json=DEPLOYMENT, headers=USER)
        assert code_of(reply) == (403, "forbidden")


TENANTS = {
    "acme": TenantSettings(keys=("acme-1", "acme-2")),
    "labs": TenantSettings(keys=("labs-1",)),
}


def tenant_seen(server: Running, http: httpx.Client) -> str:
    """Whom a request of this client counts for."""
    seen: list[str] = []

    def plan(request: GenerationRequest) -> AsyncIterator[TextChunk]:
        seen.append(request.tenant)
        return greet(request)

    server.service.plan = plan
    body = {"model": MODEL, "prompt": "hi"}
    assert http.post("/v1/completions", json=body).status_code == 200
    [tenant] = seen
    return tenant


@pytest.mark.parametrize(
    ("key", "tenant"), [("user-key", ""), ("acme-2", "acme"), ("labs-1", "labs"), ("admin-key", "")]
)
def test_a_request_is_of_the_tenant_whose_key_it_has(start: Start, key: str, tenant: str) -> None:
    server = start(tenants=TENANTS, **KEYS)
    with server.client(headers={"Authorization": f"Bearer {key}"}) as http:
        assert tenant_seen(server, http) == tenant


@pytest.mark.parametrize(("key", "tenant"), [("acme-2", "acme"), ("user-key", ""), ("wrong", "")])
def test_a_key_over_the_private_socket_says_whose_the_request_is(
    start: Start, key: str, tenant: str
) -> None:
    server = start(tenants=TENANTS, **KEYS)
    with server.trusted_client() as http:
        http.headers["Authorization"] = f"Bearer {key}"
        assert tenant_seen(server, http) == tenant


def test_keys_of_tenants_alone_close_the_server(start: Start) -> None:
    with start(tenants={"acme": TenantSettings(keys=("acme-1",))}).client() as http:
        assert code_of(http.get("/v1/models")) == (401, "invalid_api_key")
        user = {"Authorization": "Bearer acme-1"}
        assert http.get("/v1/models", headers=user).status_code == 200
        assert code_of(http.get("/metrics", headers=user)) == (403, "forbidden")


def test_admin_keys_open_everything(start: Start) -> None:
    with start(**KEYS).client() as http:
        for path in ["/v1/models", *ADMIN_PATHS]:
            assert http.get(path, headers=ADMIN).status_code == 200, path


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Bearer  x user-key",
        "Bearer user-keyy",
        "Bearer user-ke",
        "Basic user-key",
        "user-key",
    ],
)
def test_other_keys_open_nothing(start: Start, value: str) -> None:
    with start(**KEYS).client() as http:
        reply = http.get("/v1/models", headers={"Authorization": value})
    assert code_of(reply) == (401, "invalid_api_key")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_a_key_that_is_no_text_opens_nothing(start: Start) -> None:
    with start(**KEYS).client() as http:
        reply = http.get("/v1/models", headers={"Authorization": b"Bearer \xff\xfe"})
    assert reply.status_code == 401


def test_an_empty_key_in_the_settings_opens_nothing(start: Start) -> None:
    with start(api_keys=("",)).client() as http:
        reply = http.get("/v1/models", headers={"Authorization": "Bearer"})
    assert reply.status_code == 401


def test_users_keys_alone_close_administration_over_tcp(start: Start) -> None:
    server = start(api_keys=("user-key",))
    with server.client() as http:
        assert http.get("/admin/v1/models", headers=USER).status_code == 403
    with server.trusted_client() as http:
        assert http.get("/admin/v1/models").status_code == 200


def test_admin_keys_alone_leave_inference_open(start: Start) -> None:
    with start(admin_keys=("admin-key",)).client() as http:
        assert http.get("/v1/models").status_code == 200
        assert http.get("/admin/v1/models").status_code == 401


def test_health_needs_no_key(start: Start) -> None:
    with start(**KEYS).client() as http:
        for path in ("/", "/healthz", "/readyz"):
            assert http.get(path).status_code == 200


def test_the_openai_client_sees_an_authentication_error(start: Start) -> None:
    server = start(**KEYS)
    ask = {"model": MODEL, "prompt": "a"}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(**ask)
        with pytest.raises(openai.AuthenticationError):
            client.completions.create(**ask, stream=True)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="second-key") as client:
        assert client.completions.create(**ask).choices[0].text == "Hello world!"


def test_the_private_socket_is_trusted(start: Start) -> None:
    server = start(**KEYS)
    with server.trusted_client() as http:
        for path in ["/v1/models", *ADMIN_PATHS]:
            assert http.get(path).status_code == 200, path
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 200
        assert http.post("/admin/v1/models", json=DEPLOYMENT).status_code == 201
    assert server.service.calls == [("deploy", "new", "demo:smollm2", None, NO_BOUNDS, True, False)]


def test_a_deploy_over_tcp_is_not_trusted(start: Start) -> None:
    server = start(**KEYS)
    with server.client(headers=ADMIN) as http:
        assert http.post("/admin/v1/models", json=DEPLOYMENT).status_code == 201
    assert server.service.calls == [
        ("deploy", "new", "demo:smollm2", None, NO_BOUNDS, False, False)
    ]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8080", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("[::1]", 200),
        ("models.example.org:80", 200),
        ("evil.example", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example:80@localhost", 403),
        ("", 403),
        ("[", 403),
    ],
)
def test_hosts_other_than_the_servers_own_are_refused(start: Start, host: str, status: int) -> None:
    with start(allowed_hosts=("models.example.org",)).client() as http:
        assert http.get("/v1/models", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://localhost:8080", 200),
        ("https://chat.example.org", 200),
        ("http://localhost:9999", 403),
        ("https://evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_origins_are_refused(start: Start, origin: str, status: int) -> None:
    server = start(allowed_origins=("https://chat.example.org",))
    headers = {"Host": "localhost:8080", "Origin": origin}
    with server.client(headers=headers) as http:
        replies = [http.get("/v1/models"), http.post("/admin/v1/models", json=DEPLOYMENT)]
    assert [reply.status_code // 100 for reply in replies] == [status // 100] * 2
    assert len(server.service.calls) == (status == 200)


def test_an_allowed_page_passes_its_browsers_checks(start: Start) -> None:
    server = start(**KEYS, allowed_origins=("https://chat.example.org",))
    asked = {
        "Origin": "https://chat.example.org",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    with server.client() as http:
        preflight = http.options("/v1/chat/completions", headers=asked)
        refused = http.get("/v1/models", headers={"Origin": asked["Origin"]})
        foreign = http.options("/v1/models", headers={**asked, "Origin": "https://evil.example"})
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == asked["Origin"]
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == asked["Origin"]
    assert foreign.status_code == 403
    assert "access-control-allow-origin" not in foreign.headers
