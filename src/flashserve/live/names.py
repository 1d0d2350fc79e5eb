"""Models and adapters share one space of names, because a request names either in one field."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from flashserve.errors import ConflictError, InputError
from flashserve.types import MODEL_NAME

_MAX_SHOWN = 20
_MAX_CLOSE = 3


class Names:
    """Who has which name, or is about to take it. All on one thread."""

    def __init__(self) -> None:
        self._kinds: dict[str, str] = {}
        self._claims: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def has(self, name: str) -> bool:
        return name in self._kinds

    def put(self, name: str, kind: str) -> None:
        self._kinds[name] = kind

    def remove(self, name: str) -> None:
        self._kinds.pop(name, None)

    @contextlib.contextmanager
    def claiming(self, name: str, kind: str) -> Iterator[None]:
        """While it is found out whether `name` can become a `kind`, nothing of another kind can.

        Raises:
            ConflictError: something else has the name, or is about to.
        """
        others = {self._kinds.get(name, kind), *self._claims.get(name, ())} - {kind}
        if others:
            raise ConflictError(
                f"{name} is the name of {_a(others.pop())}: delete it first, or take another name"
            )
        claims = self._claims.setdefault(name, [])
        claims.append(kind)
        try:
            yield
        finally:
            claims.remove(kind)
            if not claims:
                self._claims.pop(name, None)

    def suggestion(self, name: str) -> str:
        """The end of a sentence that says that `name` is unknown: what may have been meant."""
        return suggestion(name, self._kinds)


def check_name(name: str, kind: str) -> None:
    """Raises InputError when no `kind` can be called so."""
    if not MODEL_NAME.fullmatch(name):
        raise InputError(
            f"{kind} name {name[:130]!r} does not match {MODEL_NAME.pattern}", param="name"
        )


def suggestion(name: str, known: Iterable[str], there: str = "deployed") -> str:
    """Close matches first, then what there is, `there`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, _MAX_CLOSE)
    meant = f"did you mean {' or '.join(close)}? " if close else ""
    listed = ", ".join(names[:_MAX_SHOWN]) or "none"
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"{meant}{there}: {listed}{more}"


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
