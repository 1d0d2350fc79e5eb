from __future__ import annotations

import subprocess
import sys

import pytest
import typer.testing

from flashserve.cli import main as cli
from flashserve.cli.serve import without_nones

HEAVY = {"torch", "transformers", "fastapi", "uvicorn", "numpy", "tokenizers"}


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    """The exit code of one command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["flashserve", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code


COMMANDS = [
    *(command.__name__ for command in cli.EXAMPLES),
    *(f"adapter {command.__name__.rstrip('_')}" for command in cli.ADAPTER_EXAMPLES),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_shows_an_example(command: str) -> None:
    shown = typer.testing.CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert shown.exit_code == 0
    assert f"Example:\n    flashserve {command}" in shown.output


def test_version_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("flashserve 0.")


def test_wrong_usage_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "stage", "m", "--tier", "moon") == 2
    assert "moon" in capsys.readouterr().err


def test_a_failure_is_one_line_on_stderr_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "ps", "--url", "nowhere") == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("flashserve: error: nowhere is not a server's URL")
    assert printed.err.count("\n") == 1


def test_a_misspelled_setting_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLASHSERVE_NODES__NUM_WORKERS", "1")
    assert run_main(monkeypatch, "config") == 1
    assert "FLASHSERVE_NODES__NUM_WORKERS" in capsys.readouterr().err


def test_an_unexpected_error_is_one_line_that_says_how_to_see_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(**_: object) -> None:
        raise ZeroDivisionError("no\nluck")

    monkeypatch.setattr("flashserve.cli.config.load_settings", broken)
    assert run_main(monkeypatch, "config") == 1
    assert capsys.readouterr().err == (
        "flashserve: error: unexpected ZeroDivisionError: no luck "
        "(set FLASHSERVE_LOG_LEVEL=debug for the traceback)\n"
    )
    monkeypatch.setenv("FLASHSERVE_LOG_LEVEL", "debug")
    monkeypatch.setattr(sys, "argv", ["flashserve", "config"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flashserve.cli.config.load_settings", interrupted)
    assert run_main(monkeypatch, "config") == 130


def test_commands_start_without_the_libraries_of_the_server() -> None:
    code = (
        "import sys, flashserve.cli.main\n"
        "import flashserve.cli.client\n"
        f"print(*sorted({HEAVY} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_options_of_serve_that_are_not_given_do_not_hide_settings() -> None:
    given = {"data_dir": None, "server": {"host": None, "port": 0}, "node": {"num_workers": None}}
    assert without_nones(given) == {"server": {"port": 0}}
