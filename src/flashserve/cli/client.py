"""How commands reach a running server: HTTP over its private Unix socket, or over a URL."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from flashserve.config import load_settings
from flashserve.errors import FlashServeError, InputError, UnavailableError, error_from_code

# A deploy or a cold start takes as long as it takes; only connecting is bounded.
_TIMEOUT = httpx.Timeout(None, connect=5.0)


def connect(url: str | None = None) -> Client:
    """A client of the server that the user means.

    A URL that the user names wins; otherwise the server of this data directory is meant.

    Raises:
        UnavailableError: no server listens there; says how to start or name one.
    """
    if url is not None:
        return Client(_over_url(url), url)
    return connect_to_socket(load_settings().socket_path)


def connect_to_socket(path: Path) -> Client:
    """A client over a private socket; it needs no key, because only this user can open it.

    Raises:
        UnavailableError: no server listens there; says how to start or name one.
    """
    _require_listener(path)
    transport = httpx.HTTPTransport(uds=str(path))
    http = httpx.Client(transport=transport, base_url="http://localhost", timeout=_TIMEOUT)
    return Client(http, str(path))


class Client:
    """Calls of one server; its errors are raised as what they are.

    where: the server's address as the user knows it.
    """

    def __init__(self, http: httpx.Client, where: str) -> None:
        self._http = http
        self._where = where

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def models(self) -> list[dict[str, Any]]:
        """Every deployed model, as `flashserve ps --json` prints it."""
        listed: list[dict[str, Any]] = self._call("GET", "/admin/v1/models")["data"]
        return listed

    def tiers(self) -> list[dict[str, Any]]:
        """Every node's tiers, as `flashserve ps --tiers --json` prints them."""
        listed: list[dict[str, Any]] = self._call("GET", "/admin/v1/tiers")["data"]
        return listed

    def savings(self, days: int) -> dict[str, Any]:
        """The report of so many days, as `flashserve savings --json` prints it."""
        report: dict[str, Any] = self._call("GET", f"/admin/v1/savings?days={days}")
        return report

    def decisions(self, limit: int) -> list[dict[str, Any]]:
        """The latest orders with their reasons, the newest first."""
        listed: list[dict[str, Any]] = self._call("GET", f"/admin/v1/decisions?limit={limit}")[
            "data"
        ]
        return listed

    def deploy(self, name: str, source: str, options: Mapping[str, Any]) -> dict[str, Any]:
        body = {"name": name, "source": source, **options}
        model: dict[str, Any] = self._call("POST", "/admin/v1/models", body)
        return model

    def delete(self, name: str) -> None:
        self._call("DELETE", _model_path(name))

    def stage(self, name: str, tier: str) -> dict[str, Any]:
        model: dict[str, Any] = self._call("POST", f"{_model_path(name)}/stage", {"tier": tier})
        return model

    def evict(self, name: str, tier: str) -> dict[str, Any]:
        model: dict[str, Any] = self._call("POST", f"{_model_path(name)}/evict", {"tier": tier})
        return model

    def adapters(self, base: str | None = None) -> list[dict[str, Any]]:
        """Every adapter, or those of one model, as `flashserve adapter list --json` prints it."""
        query = f"?{urllib.parse.urlencode({'base': base})}" if base else ""
        listed: list[dict[str, Any]] = self._call("GET", f"/admin/v1/adapters{query}")["data"]
        return listed

    def add_adapter(self, base: str, name: str, source: str, *, replace: bool) -> dict[str, Any]:
        body = {"base": base, "name": name, "source": source, "replace": replace}
        adapter: dict[str, Any] = self._call("POST", "/admin/v1/adapters", body)
        return adapter

    def remove_adapter(self, name: str) -> None:
        self._call("DELETE", f"/admin/v1/adapters/{urllib.parse.quote(name, safe='/')}")

    def forecasts(self) -> dict[str, Any]:
        """How the forecaster is (`status`), and what it expects of each series (`data`)."""
        listed: dict[str, Any] = self._call("GET", "/admin/v1/forecasts")
        return listed

    def forecast(self, name: str) -> dict[str, Any]:
        path = f"/admin/v1/forecasts/{urllib.parse.quote(name, safe='/:')}"
        forecast: dict[str, Any] = self._call("GET", path)
        return forecast

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The objects of a server-sent event stream, in order.

        Raises:
            FlashServeError: the server refused, or reported an error within the stream.
        """
        with (
            self._reported(),
            self._http.stream("POST", path, json=body, headers=_key("FLASHSERVE_API_KEY")) as reply,
        ):
            if reply.is_error:
                reply.read()
                raise _error_of(reply)
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise _error_from(chunk["error"])
                    yield chunk

    def _call(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
        with self._reported():
            reply = self._http.request(
                method, path, json=body, headers=_key("FLASHSERVE_ADMIN_KEY")
            )
        if reply.is_error:
            raise _error_of(reply)
        try:
            return reply.json() if reply.content else None
        except ValueError:
            raise UnavailableError(f"{self._where} did not answer as FlashServe does") from None

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """Failures of the connection, in words that say which server was meant."""
        try:
            yield
        except httpx.ConnectError as error:
            raise UnavailableError(f"no server answers at {self._where}: {error}") from None
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise UnavailableError(f"the server at {self._where} broke off: {reason}") from None


def _over_url(url: str) -> httpx.Client:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        raise InputError(f"{url} is not a server's URL, such as http://127.0.0.1:8080")
    return httpx.Client(base_url=url.rstrip("/"), timeout=_TIMEOUT)


def _require_listener(path: Path) -> None:
    """A socket file may outlive its server, so only a connection tells."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except PermissionError:
            raise UnavailableError(
                f"the server at {path} belongs to another user: use --url and a key"
            ) from None
        except OSError:
            raise UnavailableError(
                f"no server is running at {path}: start one with `flashserve serve`, "
                "or name one with --url or FLASHSERVE_URL"
            ) from None


def _key(variable: str) -> dict[str, str]:
    key = os.environ.get(variable) or os.environ.get("FLASHSERVE_ADMIN_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _model_path(name: str) -> str:
    return f"/admin/v1/models/{urllib.parse.quote(name, safe='/')}"


def _error_of(reply: httpx.Response) -> FlashServeError:
    try:
        return _error_from(reply.json()["error"])
    except (ValueError, KeyError, TypeError):
        return UnavailableError(f"the server answered {reply.status_code} without an explanation")


def _error_from(error: Mapping[str, Any]) -> FlashServeError:
    return error_from_code(str(error.get("code")), str(error.get("message")))
