"""Module-name patterns of an adapter, matched in linear time.

PEFT takes them as regular expressions of Python, whose matcher can be made to run for years by a
pattern out of a hostile file. Here a pattern is a set of places that move through the name side by
side (Thompson, CACM 11(6), 1968), so a name costs at most its length times the pattern's.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator

MAX_PATTERN_CHARACTERS = 512
_MAX_STEPS = 2048
_MAX_DEPTH = 16
_MAX_REPEATS = 64

_PLAIN = re.compile(r"(?:\w|\.|\\\.)+", re.ASCII)
_REPEAT = re.compile(r"\{(?=[\d,])(\d{0,4})(?:(,)(\d{0,4}))?\}")
_GROUP = re.compile(r"\((?:\?:|\?P<\w+>|(?!\?))")
_CLASSES: dict[str, Callable[[str], bool]] = {
    "d": str.isdecimal,
    "D": lambda c: not c.isdecimal(),
    "w": lambda c: c.isalnum() or c == "_",
    "W": lambda c: not (c.isalnum() or c == "_"),
}

Accepts = Callable[[str], bool]
# What a place does: take a character, go on at other places, or ask where in the name it is.
Step = Accepts | tuple[int, ...] | str


class PatternError(Exception):
    """What is wrong with a pattern; the message follows its name."""


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Pattern:
    return Pattern(pattern)


def first_match(patterns: Iterable[str], name: str) -> str | None:
    """The first pattern that fits a module's name, or the end of it after a dot, as PEFT picks it.

    Raises:
        PatternError: one of those before it is no pattern that is taken here.
    """
    return next((pattern for pattern in patterns if _compiled(pattern).fits(name)), None)


class Pattern:
    """A regular expression without references, look-around and flags.

    Raises:
        PatternError: it is none, or too long.
    """

    def __init__(self, text: str) -> None:
        self.is_plain = _PLAIN.fullmatch(text) is not None
        if len(text) > MAX_PATTERN_CHARACTERS:
            raise PatternError(f"has more than {MAX_PATTERN_CHARACTERS} characters")
        if self.is_plain:
            self._num_characters = len(text.replace("\\.", "."))
            self._plain = re.compile(text)
        else:
            self._steps = _Parser(text).steps

    def fits(self, name: str) -> bool:
        r"""Whether `(.*\.)?(PATTERN)$` matches the name from its start."""
        if self.is_plain:  # no choice to make: as fast as comparing
            begin = len(name) - self._num_characters
            is_part = begin == 0 or (begin > 0 and name[begin - 1] == ".")
            return is_part and self._plain.fullmatch(name, begin) is not None
        places: set[int] = set()
        for index in range(len(name) + 1):
            if index == 0 or name[index - 1] == ".":
                places.add(0)
            places = self._closure(places, is_begin=index == 0, is_end=index == len(name))
            if index == len(name):
                break
            places = {place + 1 for place in places if self._takes(place, name[index])}
        return len(self._steps) in places

    def _takes(self, place: int, character: str) -> bool:
        step = self._steps[place] if place < len(self._steps) else None
        return callable(step) and step(character)

    def _closure(self, places: Iterable[int], *, is_begin: bool, is_end: bool) -> set[int]:
        """All places that are reached without taking a character."""
        reached: set[int] = set()
        left = list(places)
        while left:
            place = left.pop()
            if place in reached:
                continue
            reached.add(place)
            match self._steps[place] if place < len(self._steps) else None:
                case tuple() as jumps:
                    left += [place + jump for jump in jumps]
                case "^" if is_begin:
                    left.append(place + 1)
                case "$" if is_end:
                    left.append(place + 1)
        return reached


class _Parser:
    """Turns a pattern into steps; jumps are relative: a piece is repeated by copying it."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self.steps = self._alternatives(0)
        if self._at < len(text):
            raise PatternError("has a bracket too many")

    def _alternatives(self, depth: int) -> list[Step]:
        if depth > _MAX_DEPTH:
            raise PatternError("has too many brackets in one another")
        found = self._sequence(depth)
        while self._peek() == "|":
            self._at += 1
            other = self._sequence(depth)
            found = self._bounded(
                [(1, len(found) + 2), *found, (len(other) + 1,), *other],
            )
        return found

    def _sequence(self, depth: int) -> list[Step]:
        found: list[Step] = []
        while self._peek() not in {"", "|", ")"}:
            piece = self._atom(depth)
            found = self._bounded(found + self._repeated(piece))
        return found

    def _atom(self, depth: int) -> list[Step]:
        character = self._take()
        match character:
            case "(":
                return self._group(depth)
            case "[":
                return [self._set()]
            case ".":
                return [lambda _: True]
            case "^" | "$":
                return [character]
            case "\\":
                return [self._escaped()]
            case "*" | "+" | "?":
                raise PatternError(f"repeats nothing with {character}")
        return [functools.partial(str.__eq__, character)]

    def _group(self, depth: int) -> list[Step]:
        match = _GROUP.match(self._text, self._at - 1)
        if match is None:
            raise PatternError("looks around or sets flags, which is not taken")
        self._at = match.end()
        found = self._alternatives(depth + 1)
        if self._take() != ")":
            raise PatternError("lacks a closing bracket")
        return found

    def _escaped(self) -> Accepts:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if not character or character.isalnum():
            raise PatternError(f"has \\{character}, which is not taken")
        return functools.partial(str.__eq__, character)

    def _set(self) -> Accepts:
        is_negated = self._peek() == "^"
        self._at += is_negated
        members: list[Accepts] = []
        while (character := self._take()) != "]" or not members:
            if not character:
                raise PatternError("lacks a closing bracket")
            if character == "\\":
                members.append(self._escaped())
            elif self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in {"]", ""}:
                self._at += 1
                members.append(_between(character, self._take()))
            else:
                members.append(functools.partial(str.__eq__, character))
        return lambda c: any(member(c) for member in members) != is_negated

    def _repeated(self, piece: list[Step]) -> list[Step]:
        times = self._times()
        if times is None:
            return piece
        least, most = times
        self._at += self._peek() == "?"  # lazy or not, the same names fit
        if self._times() is not None:
            raise PatternError("repeats a repetition")
        size = len(piece)
        found = self._bounded(piece, least)
        if most is None:
            return [*found, (1, size + 2), *piece, (-size - 1,)]
        optional: list[Step] = [(1, size + 1), *piece]
        return found + self._bounded(optional, most - least)

    def _times(self) -> tuple[int, int | None] | None:
        simple = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(self._peek())
        if simple:
            self._at += 1
            return simple
        match = _REPEAT.match(self._text, self._at)
        if match is None:
            return None
        self._at = match.end()
        least = int(match[1] or 0)
        most = least if not match[2] else int(match[3]) if match[3] else None
        if least > _MAX_REPEATS or (most is not None and not least <= most <= _MAX_REPEATS):
            raise PatternError(f"repeats with {match[0]}, which is not taken")
        return least, most

    def _bounded(self, steps: list[Step], times: int = 1) -> list[Step]:
        if len(steps) * times > _MAX_STEPS:
            raise PatternError("is too complicated")
        return steps * times

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        self._at += 1
        return self._text[self._at - 1 : self._at]


def _between(first: str, last: str) -> Accepts:
    if last == "\\" or first > last:
        raise PatternError(f"has the range {first}-{last}, which is none")
    return lambda c: first <= c <= last


def check(patterns: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Those that cannot be used, each with what is wrong with it."""
    for pattern in patterns:
        try:
            _compiled(pattern)
        except PatternError as error:
            yield pattern, str(error)
