"""`flashserve`: runs one command; every failure is one line on stderr and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. Heavy libraries are imported by the
commands that need them, so that `flashserve ps` answers at once.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from flashserve.cli import adapters
from flashserve.cli.backtest import backtest
from flashserve.cli.calibrate import calibrate
from flashserve.cli.config import config
from flashserve.cli.decisions import decisions
from flashserve.cli.forecast import forecast
from flashserve.cli.fsck import fsck
from flashserve.cli.generate import run
from flashserve.cli.models import delete, deploy, evict, ps, stage
from flashserve.cli.savings import savings
from flashserve.cli.serve import serve
from flashserve.cli.simulate import simulate
from flashserve.errors import FlashServeError

EXAMPLES: dict[Callable[..., None], list[str]] = {
    serve: [
        "flashserve serve",
        "flashserve serve --port 9000 --workers 4 --dram 32GiB",
        "flashserve serve --policy keep-alive-10m --shadow flashserve",
    ],
    deploy: [
        "flashserve deploy smollm2 demo:smollm2",
        "flashserve deploy team/qwen ~/models/qwen3-8b --keep-alive 60",
        "flashserve deploy chat ~/models/chat --schedule 'mon-fri 08:00-18:00 min=1'",
    ],
    ps: ["flashserve ps", "flashserve ps --json"],
    decisions: ["flashserve decisions", "flashserve decisions smollm2 --limit 100"],
    savings: ["flashserve savings", "flashserve savings --days 30 --json"],
    run: [
        'flashserve run smollm2 "What is the capital of France?"',
        "cat letter.txt | flashserve run smollm2 - --max-tokens 64",
    ],
    stage: ["flashserve stage smollm2 --tier dram"],
    evict: ["flashserve evict smollm2 --tier dram"],
    delete: ["flashserve delete smollm2"],
    forecast: ["flashserve forecast", "flashserve forecast smollm2", "flashserve forecast --json"],
    backtest: [
        "flashserve backtest --trace AzureLLMInferenceTrace_conv.csv",
        "flashserve backtest --trace day.parquet --models hazard,ewma-15 --html report.html",
    ],
    simulate: [
        "flashserve simulate --html report.html",
        "flashserve simulate --trace day.parquet --nodes 8 --policy keep-alive-10m,flashserve",
    ],
    calibrate: ["flashserve calibrate", "flashserve calibrate --source s3://bucket/model"],
    fsck: ["flashserve fsck", "flashserve fsck --data-dir /srv/flashserve --no-repair --json"],
    config: ["flashserve config", "FLASHSERVE_NODE__NUM_WORKERS=1 flashserve config --json"],
}
"""Every command, in the order of `flashserve --help`, with the examples of its own --help."""

ADAPTER_EXAMPLES: dict[Callable[..., None], list[str]] = {
    adapters.add: [
        "flashserve adapter add smollm2 shouting ./my-lora",
        "flashserve adapter add team/qwen support s3://bucket/loras/support --replace",
    ],
    adapters.list_: ["flashserve adapter list", "flashserve adapter list smollm2 --json"],
    adapters.remove: ["flashserve adapter remove shouting"],
}
"""The commands of `flashserve adapter`, likewise."""


def _group(name: str, examples: dict[Callable[..., None], list[str]], summary: str) -> typer.Typer:
    group = typer.Typer(
        name=name,
        help=summary,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for command, lines in examples.items():
        # The backspace keeps the lines as they are, where text is otherwise filled.
        epilog = "\n".join(["\b", "Example:", *(f"  {line}" for line in lines)])
        group.command(command.__name__.rstrip("_"), epilog=epilog)(command)
    return group


app = _group("flashserve", EXAMPLES, "Serve many language models on one machine.")
app.add_typer(_group("adapter", ADAPTER_EXAMPLES, "Serve LoRA fine-tunes of deployed models."))


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flashserve {importlib.metadata.version('flashserve')}")
        raise typer.Exit


@app.callback()
def _global_options(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and stop."
        ),
    ] = False,
) -> None:
    """Serve many language models on one machine; idle ones cost nothing."""


def main() -> None:
    try:
        app(prog_name="flashserve")
    except FlashServeError as error:
        _fail(error.message)
    except Exception as error:
        # The last resort of a command line: one line instead of a traceback.
        if os.environ.get("FLASHSERVE_LOG_LEVEL", "").lower() == "debug":
            raise
        _fail(
            f"unexpected {type(error).__name__}: {error} "
            "(set FLASHSERVE_LOG_LEVEL=debug for the traceback)"
        )


def _fail(message: str) -> None:
    sys.stderr.write(f"flashserve: error: {' '.join(message.split())}\n")
    sys.exit(1)


if __name__ == "__main__":
    main()
