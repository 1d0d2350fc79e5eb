"""Puts the store's handout on the node's private socket, and takes it off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import structlog

from flashserve.config import Settings
from flashserve.errors import ConflictError, InputError
from flashserve.node.sockets import UnixListener, bind_unix_socket
from flashserve.store.handout.client import socket_path
from flashserve.store.handout.server import Handout
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec

_log = structlog.get_logger()


class HandoutSocket:
    """What other processes of this machine's user reach the store through.

    A socket that cannot be had is logged and done without: serving does not depend on it.
    """

    def __init__(
        self, settings: Settings, store: Store, models: Callable[[], dict[ModelId, ModelSpec]]
    ) -> None:
        """models: whose names may be asked for."""
        self._listener: UnixListener | None = None
        path = socket_path(settings.data_dir)
        try:
            self._listener = bind_unix_socket(path)
        except (ConflictError, InputError) as error:
            _log.warning("models_are_not_handed_out", socket=str(path), reason=error.message)
            return
        self._handout = Handout(
            self._listener.socket,
            store,
            settings.data_dir,
            models,
            settings.store,
        )
        self._handout.start()

    def leases(self) -> Mapping[str, int]:
        """How many other processes have or wait for a model, by the uri of its source."""
        return {} if self._listener is None else self._handout.leases()

    async def close(self) -> None:
        """Before the store is closed."""
        if self._listener is not None:
            await self._handout.close()
            self._listener.close()
