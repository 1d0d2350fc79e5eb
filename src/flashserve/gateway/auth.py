"""Who may ask what. Pure ASGI; the private Unix socket is let through as the administrator.

Over TCP, first the Host and Origin headers are checked, so that no web page can reach a server on
loopback (by DNS rebinding or by a plain cross-site request), then the key. Users' keys open
inference; admin keys open everything.
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from flashserve.config import AuthSettings, ServerSettings, Settings
from flashserve.errors import AuthenticationError, FlashServeError, ForbiddenError, InputError
from flashserve.gateway.edge import context_of, name_tenant
from flashserve.gateway.faults import error_response

_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
_PUBLIC_PATHS = frozenset({"/", "/healthz", "/readyz"})
_USER_PREFIX = "/v1/"
_ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


def check_binding(settings: Settings) -> None:
    """Raises:
    InputError: others than this machine could use the server without a key.
    """
    host = settings.server.host
    if is_loopback(host) or settings.users_need_key:
        return
    raise InputError(
        f"server.host {host!r} is reachable from other machines, and without keys anybody there "
        "could use every model: set auth.api_keys or keys of tenants (and auth.admin_keys to "
        "administer over TCP), "
        "or listen on 127.0.0.1"
    )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class HostGuard:
    """Refuses requests that a browser was tricked into sending."""

    def __init__(self, app: ASGIApp, server: ServerSettings, auth: AuthSettings) -> None:
        self._app = app
        self._hosts = _LOOPBACK_NAMES | {server.host.lower(), *map(str.lower, auth.allowed_hosts)}
        self._origins = frozenset(auth.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not context_of(scope).is_trusted:
            try:
                self._check(scope)
            except ForbiddenError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        authority = headers.get("host", "").lower()
        host = host_name(authority)
        # The address that the connection itself has reached needs no name to be trusted.
        if host not in self._hosts and host != (scope.get("server") or ("",))[0]:
            raise ForbiddenError(
                f"the Host {host[:100]!r} is not one of this server's names: add it to "
                "auth.allowed_hosts if it should be"
            )
        origin = headers.get("origin")
        if origin is None or origin in self._origins:
            return
        if origin.lower() not in {f"http://{authority}", f"https://{authority}"}:
            raise ForbiddenError(
                f"pages of {origin[:100]!r} may not call this server: add it to "
                "auth.allowed_origins if they should"
            )


def host_name(authority: str) -> str:
    """The host of "host:port", "[v6]:port" or either without a port."""
    if authority.startswith("["):
        return authority[1:].partition("]")[0]
    return authority.partition(":")[0]


class KeyGuard:
    """Asks for the key that a path needs.

    Inference needs one when users' keys are configured; everything else (administration, metrics)
    when any are, and then an admin key. Without any, the server is on loopback: check_binding. The
    private socket needs none; one that is given there says whose the request is.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._tenants = [(key.encode(), "") for key in settings.auth.api_keys if key]
        for name, tenant in settings.tenants.items():
            self._tenants += [(key.encode(), name) for key in tenant.keys]
        self._api_keys = [key for key, _ in self._tenants]
        self._admin_keys = [key.encode() for key in settings.auth.admin_keys if key]
        self._users_need_key = settings.users_need_key
        self._admins_need_key = self._users_need_key or bool(settings.auth.admin_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and context_of(scope).is_trusted:
            if _is_known(key := _bearer(scope), self._api_keys):
                name_tenant(scope, self._tenant_of(key))
        elif scope["type"] == "http":
            try:
                self._check(scope)
            except FlashServeError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        path = scope["path"]
        is_user_path = path.startswith(_USER_PREFIX) and path not in _ADMIN_PATHS
        needs_key = self._users_need_key if is_user_path else self._admins_need_key
        if path in _PUBLIC_PATHS or not needs_key:
            return
        key = _bearer(scope)
        is_admin, is_user = _is_known(key, self._admin_keys), _is_known(key, self._api_keys)
        if is_admin or (is_user and is_user_path):
            if is_user:
                name_tenant(scope, self._tenant_of(key))
            return
        if is_user:
            raise ForbiddenError(f"{path} needs an admin key; this key is a user's")
        raise AuthenticationError(
            "this key is not known" if key else "a key is needed: send Authorization: Bearer KEY"
        )

    def _tenant_of(self, key: bytes) -> str:
        """Of a key that is known."""
        names = [name for known, name in self._tenants if hmac.compare_digest(key, known)]
        return names[0]


def _bearer(scope: Scope) -> bytes:
    for name, value in scope["headers"]:
        if name == b"authorization":
            kind, _, key = bytes(value).partition(b" ")
            return key.strip() if kind.lower() == b"bearer" else b""
    return b""


def _is_known(key: bytes, known: Sequence[bytes]) -> bool:
    """Compares with every key in constant time, so that time tells nothing."""
    matches = [hmac.compare_digest(key, candidate) for candidate in known]
    return any(matches)
