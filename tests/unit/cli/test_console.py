from __future__ import annotations

import re
import threading

import pytest

from flashserve.cli import console
from flashserve.errors import UnavailableError


@pytest.mark.parametrize(
    ("num_bytes", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (269_060_552, "256.6 MiB"),
        (3 << 40, "3.0 TiB"),
    ],
)
def test_bytes_are_shown_in_their_largest_unit(num_bytes: int, shown: str) -> None:
    assert console.human_bytes(num_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "-"), (0.4, "0 s"), (59.9, "59 s"), (61, "1 min"), (7300, "2 h"), (200_000, "2 d")],
)
def test_ages_are_shown_in_their_largest_unit(seconds: float | None, shown: str) -> None:
    assert console.human_age(seconds) == shown


def test_phases_below_a_second_are_shown_in_milliseconds() -> None:
    assert console.human_seconds(0.0421) == "42 ms"
    assert console.human_seconds(1.5) == "1.50 s"


def test_a_table_on_no_terminal_is_plain_and_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    reason = "because " * 30
    console.print_table(
        ["name", "reason"], [["m", reason.strip()]], fold=["reason"], styles={"m": "red"}
    )
    printed = capsys.readouterr().out
    assert printed.splitlines() == ["name reason".replace(" ", "  ", 1), f"m     {reason.strip()}"]
    assert "\x1b" not in printed


@pytest.mark.parametrize(("width", "shown"), [("60", False), ("200", True)])
def test_a_narrow_terminal_spares_columns_rather_than_fold_text_to_bits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: str, shown: bool
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    row = ["model", "12345678901234567890", "12345678901234567890", "because it was asked for"]
    console.print_table(
        ["name", "here", "extra", "reason"], [row], fold=["name", "reason"], spare=["extra"]
    )
    printed = capsys.readouterr().out
    assert ("extra" in printed) == shown
    assert "because it was" in printed


def test_a_table_on_a_terminal_folds_to_its_width(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console.print_table(
        ["name", "reason"], [["team/" + "model" * 20, "because " * 30]], fold=["name", "reason"]
    )
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum(line.count("because") for line in lines) == 30


def test_a_terminal_gets_the_beginning_of_a_long_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "P(request in 61 s) 0.2: start 0.031 > idle 0.0007; " * 3
    assert console.beginning(reason) == reason
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    short = console.beginning(reason)
    assert len(short) <= 80
    assert short.endswith(" …")
    assert reason.startswith(short.removesuffix(" …"))
    assert console.beginning("deployed") == "deployed"


def test_sentences_end_their_lines_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "a request that finds no worker waits for a start " * 4
    console.print_text(sentence.strip())
    assert capsys.readouterr().out.count("\n") == 1
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    console.print_text(sentence.strip())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 4
    assert max(map(len, lines)) <= 40
    assert " ".join(lines) == sentence.strip()


def test_waiting_on_no_terminal_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console.waiting("deploying m"):
        pass
    assert capsys.readouterr().err == "deploying m ...\n"


def test_progress_on_no_terminal_is_a_line_for_each_tenth(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.progressing("checking") as tell:
        for done in range(1001):
            tell(done, 1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"checking: {tenth}00 B of 1000 B" for tenth in range(1, 11)]


def test_progress_on_a_terminal_is_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console.progressing("checking") as tell:
        tell(512, 1024)
        tell(1024, 1024)
    assert "1.0/1.0 KiB" in capsys.readouterr().err


def test_following_on_no_terminal_asks_for_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    def look() -> tuple[int, int]:
        raise AssertionError

    with console.following("staging m", look):
        pass
    assert capsys.readouterr().err == "staging m ...\n"


@pytest.mark.parametrize("fails", [False, True])
def test_following_on_a_terminal_shows_bytes_until_nobody_can_tell(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setattr(console, "_LOOK_S", 0.001)
    looks = iter([None, (5 << 20, 20 << 20)])
    seen_all = threading.Event()

    def look() -> tuple[int, int] | None:
        try:
            return next(looks)
        except StopIteration:
            seen_all.set()
            if fails:
                raise UnavailableError("the server is gone") from None
            return None

    with console.following("staging m", look):
        seen_all.wait()
    written = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "staging m" in written
    assert "5.0/20.0 MiB" in written


def test_pieces_of_work_are_named_once_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with console.counting("backtest") as tell:
        for done in range(3):
            tell("naive", done, 3)
        tell("ewma", 1, 3)
    assert capsys.readouterr().err == "backtest: naive\nbacktest: ewma\n"
