"""What is known of remote sources, so that a start from DRAM asks nobody."""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable

from flashserve.errors import FlashServeError
from flashserve.store.origin import Origin, Origins
from flashserve.types import Tier

_log = logging.getLogger(__name__)

_CLOSE_S = 1.0  # a look that hangs in the network is left to itself


@dataclasses.dataclass(frozen=True, slots=True)
class _Version:
    identity: str
    is_remote: bool


class Versions:
    """What was last seen of each source that takes the network to look at. Thread-safe.

    Looks are made behind, one after another by one thread, and for each source at most once per
    `recheck_s` seconds. One that fails changes nothing: what is served goes on.
    """

    def __init__(
        self, origins: Origins, recheck_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._origins = origins
        self._recheck_s = recheck_s
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[str, _Version] = {}
        self._looked_at: dict[str, float] = {}
        self._queued: set[str] = set()
        self._queue: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            self._known.clear()
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_CLOSE_S)

    def current(self, uri: str) -> str | None:
        """The identity of the version to serve; None for a source that must be asked."""
        with self._lock:
            known = self._known.get(uri)
            return known.identity if known else None

    def saw(self, origin: Origin) -> None:
        """A source was asked just now."""
        uri = origin.source.uri
        if not self._origins.is_far(uri):
            return
        with self._lock:
            self._known[uri] = _Version(origin.listing.identity, origin.is_remote)
            self._looked_at[uri] = self._clock()

    def forget(self, uri: str) -> None:
        with self._lock:
            self._known.pop(uri, None)
            self._looked_at.pop(uri, None)

    def recheck(self, uri: str) -> None:
        """Has a source that is known looked at behind, unless that was done lately."""
        with self._lock:
            if uri not in self._known or uri in self._queued or self._is_closed:
                return
            if self._clock() - self._looked_at[uri] < self._recheck_s:
                return
            self._queued.add(uri)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="store-recheck", daemon=True)
                self._thread.start()
        self._queue.put(uri)

    def _run(self) -> None:
        while (uri := self._queue.get()) is not None and not self._is_closed:
            try:
                self._look(uri)
            except FlashServeError as error:
                _log.warning("%s: serving the copy in memory: %s", uri, error.message)
            except Exception:
                _log.exception("looking at %s failed", uri)
            finally:
                with self._lock:
                    self._queued.discard(uri)
                    if uri in self._known:
                        self._looked_at[uri] = self._clock()

    def _look(self, uri: str) -> None:
        with self._lock:
            known = self._known.get(uri)
        if known is None:
            return
        source, listing = self._origins.ask(uri)
        if known.is_remote and source.lowest_tier is not Tier.REMOTE:
            return  # a hub that does not answer: what its cache here has may be older
        with self._lock:
            if self._known.get(uri) is not known or known.identity == listing.identity:
                return
            self._known[uri] = dataclasses.replace(known, identity=listing.identity)
        _log.info("%s has changed: the next start reads it anew", uri)
