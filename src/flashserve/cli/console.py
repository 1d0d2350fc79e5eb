"""What commands print: tables and waiting signs on a terminal, plain lines everywhere else."""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import rich.console
import rich.progress
import rich.table
import rich.text

from flashserve.errors import FlashServeError

_PLAIN_WIDTH = 1000
_REMINDER_S = 10.0
_FOLDED_WIDTH = 16
"""A column of text that folds is hard to read with less."""
_LOOK_S = 0.3
_BEGINNING = 80


def stdout_console() -> rich.console.Console:
    """Fits the terminal; elsewhere wide enough that nothing is folded or cut."""
    width = None if sys.stdout.isatty() else _PLAIN_WIDTH
    return rich.console.Console(highlight=False, width=width)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def print_line(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def print_text(text: str) -> None:
    """Sentences: a terminal gets them in lines that end between words, all else as one line."""
    if sys.stdout.isatty():
        width = stdout_console().width
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)
    print_line(text)


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[str] = (),
    fold: Sequence[str] = (),
    spare: Sequence[str] = (),
    styles: dict[str, str] | None = None,
) -> None:
    """Prints `rows` under `columns`; those named in `fold` take further lines when space is short.

    A terminal is short of columns: it gets headings in several lines, without units, and not those
    in `spare` (the first goes first) that would leave too little for the ones that fold.

    right: columns of numbers; styles: cell texts that a terminal shows in a colour.
    """
    console = stdout_console()
    if console.is_terminal:
        kept = _fitting(columns, rows, fold, spare, console.width)
        rows = [[row[index] for index in kept] for row in rows]
        columns = [columns[index] for index in kept]
    table = rich.table.Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(
            _heading(column) if console.is_terminal else column,
            justify="right" if column in right else "left",
            no_wrap=column not in fold,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(rich.text.Text(cell, (styles or {}).get(cell, "")) for cell in row))
    with console.capture() as capture:
        console.print(table)
    sys.stdout.writelines(line.rstrip() + "\n" for line in capture.get().splitlines())


def _fitting(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    fold: Sequence[str],
    spare: Sequence[str],
    width: int,
) -> list[int]:
    """The columns, by index, that leave those which fold a readable width."""
    kept = list(range(len(columns)))
    for name in spare:
        fixed = [index for index in kept if columns[index] not in fold]
        taken = sum(
            1 + max(map(len, (*_heading(columns[index]).split(), *(row[index] for row in rows))))
            for index in fixed
        )
        if width - taken >= _FOLDED_WIDTH * (len(kept) - len(fixed)):
            break
        if name in columns:
            kept.remove(columns.index(name))
    return kept


def _heading(column: str) -> str:
    return column.removesuffix("_s").removesuffix("_bytes").replace("_", "\n")


@contextlib.contextmanager
def waiting(doing: str) -> Iterator[None]:
    """Shows that work goes on: a bar with the elapsed time, or a plain line now and then."""
    console = rich.console.Console(stderr=True, highlight=False)
    if console.is_terminal:
        with _busy_bar(console) as progress:
            progress.add_task(doing, total=None)
            yield
        return
    sys.stderr.write(f"{doing} ...\n")
    done = threading.Event()
    reminder = threading.Thread(target=_remind, args=(doing, done), daemon=True)
    reminder.start()
    try:
        yield
    finally:
        done.set()
        reminder.join()


@contextlib.contextmanager
def steps(doing: str) -> Iterator[Callable[[str], None]]:
    """Shows what is being done, told through the function that it gives: a bar, or plain lines."""
    console = rich.console.Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda step: console.print(f"{doing}: {step}")
        return
    with _busy_bar(console) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda step: progress.update(task, description=f"{doing}: {step}")


@contextlib.contextmanager
def counting(doing: str) -> Iterator[Callable[[str, int, int], None]]:
    """Shows how far each of several pieces of work is: a bar, or a plain line for each.

    Yields what is to be told the piece's name, steps done and steps in all.
    """
    console = rich.console.Console(stderr=True, highlight=False)
    if not console.is_terminal:
        shown: set[str] = set()

        def tell(name: str, _done: int, _total: int) -> None:
            if name not in shown:
                shown.add(name)
                sys.stderr.write(f"{doing}: {name}\n")

        yield tell
        return
    with rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task(doing, total=None)
        yield lambda name, done, total: progress.update(
            task, description=f"{doing}: {name}", completed=done, total=total
        )


@contextlib.contextmanager
def progressing(doing: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far work is, in bytes: a bar on a terminal, elsewhere a line for each tenth.

    Yields what is to be told bytes done and bytes in all, by one thread at a time.
    """
    console = rich.console.Console(stderr=True, highlight=False)
    if console.is_terminal:
        with _byte_bar(console) as progress:
            task = progress.add_task(doing, total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)
        return
    shown = 0

    def tell(done: int, total: int) -> None:
        nonlocal shown
        tenth = 10 * done // total if total else 10
        if tenth > shown:
            shown = tenth
            sys.stderr.write(f"{doing}: {human_bytes(done)} of {human_bytes(total)}\n")

    yield tell


@contextlib.contextmanager
def following(doing: str, look: Callable[[], tuple[int, int] | None]) -> Iterator[None]:
    """As `waiting`, where a terminal also shows what somebody else has done of it.

    look: bytes done and bytes in all, None while that is not known; another thread calls it now
    and then, until it raises FlashServeError.
    """
    console = rich.console.Console(stderr=True, highlight=False)
    if not console.is_terminal:
        with waiting(doing):
            yield
        return
    done = threading.Event()
    with _byte_bar(console) as progress:
        task = progress.add_task(doing, total=None)

        def follow() -> None:
            # Who asked for the work hears what became of the server.
            with contextlib.suppress(FlashServeError):
                while not done.wait(_LOOK_S):
                    if seen := look():
                        progress.update(task, completed=seen[0], total=seen[1])

        follower = threading.Thread(target=follow, daemon=True)
        follower.start()
        try:
            yield
        finally:
            done.set()
            follower.join()


def _byte_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Fits 80 columns beside a short description."""
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=None),
        rich.progress.DownloadColumn(binary_units=True),
        rich.progress.TransferSpeedColumn(),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _busy_bar(console: rich.console.Console) -> rich.progress.Progress:
    """Moves as long as work goes on, whose end nobody knows."""
    return rich.progress.Progress(
        rich.progress.SpinnerColumn(),
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=20),
        rich.progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    )


def _remind(doing: str, done: threading.Event) -> None:
    started = time.monotonic()
    while not done.wait(_REMINDER_S):
        sys.stderr.write(f"{doing} ... {time.monotonic() - started:.0f} s\n")


def human_bytes(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def beginning(sentence: str) -> str:
    """On a terminal, of a long sentence in a table: some four lines of a narrow column."""
    if not sys.stdout.isatty():
        return sentence
    return textwrap.shorten(sentence, _BEGINNING, placeholder=" …")


def human_age(seconds: float | None) -> str:
    """A duration in its largest unit; `-` for none."""
    if seconds is None:
        return "-"
    for limit, size, unit in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h")):
        if seconds < limit:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds // 86400:.0f} d"


def human_seconds(seconds: float) -> str:
    """A phase of a receipt: milliseconds below one second."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
