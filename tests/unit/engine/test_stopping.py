from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.engine.stopping import StopMatcher


def feed(stops: list[str], pieces: list[str]) -> tuple[list[str], bool]:
    """What came out after each piece and at the end, and whether a stop was met."""
    matcher = StopMatcher(stops)
    out, stopped = [], False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out.append(text)
        if stopped:
            break
    return [*out, matcher.flush()], stopped


@pytest.mark.parametrize(
    ("stops", "pieces", "out", "stopped"),
    [
        ([], ["one ", "two"], ["one ", "two", ""], False),
        (["END"], ["a E", "N", "D b"], ["a ", "", "", ""], True),
        (["END"], ["a E", "N", "X b"], ["a ", "", "ENX b", ""], False),
        (["END"], ["a EN"], ["a ", "EN"], False),
        (["\n\n"], ["x\n", "\ny"], ["x", "", ""], True),
        (["aab"], ["aa", "ab"], ["", "a", ""], True),
        (["bc", "abcd"], ["abcd"], ["a", ""], True),
        (["bcd", "abcd"], ["xab", "cd"], ["x", "", ""], True),
        (["", "x"], ["ab", "x"], ["ab", "", ""], True),
        (["👩‍💻"], ["hi 👩", "\u200d", "💻!"], ["hi ", "", "", ""], True),
    ],
)
def test_stops(stops: list[str], pieces: list[str], out: list[str], stopped: bool) -> None:
    assert feed(stops, pieces) == (out, stopped)


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["."])
    assert matcher.push("a.b") == ("a", True)
    assert matcher.push("c") == ("", True)
    assert matcher.flush() == ""


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain definition: the first end of a stop, and the longest stop that ends there."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return text[: end - max(lengths)], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_the_text_is_cut_at_the_first_stop_however_it_arrives(
    stops: list[str], pieces: list[str]
) -> None:
    out, stopped = feed(stops, pieces)
    assert ("".join(out), stopped) == cut("".join(pieces), stops)
