"""A checkpoint that cannot be served is refused at deploy, and nobody else notices."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.e2e import checkpoints
from tests.e2e.harness import MODEL, Server


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (checkpoints.truncated, ["model.safetensors"]),
        (checkpoints.overlapping, ["model.safetensors"]),
        (checkpoints.out_of_range, ["model.safetensors"]),
        (checkpoints.endless_header, ["model.safetensors", "9223372036854775808"]),
        (checkpoints.unsupported_architecture, ["mamba"]),
        (checkpoints.unsupported_rope, ["dynamic"]),
        (checkpoints.config_mismatch, ["mlp", "999"]),
        (checkpoints.missing_layer, ["model.layers.30", "31"]),
        (checkpoints.remote_code, ["auto_map"]),
        (checkpoints.broken_config, ["config.json"]),
        (checkpoints.pickle_only, ["safetensors"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_checkpoint_is_refused_in_one_line(
    server: Server, checkpoint: Path, tmp_path: Path, damage: checkpoints.Damage, named: list[str]
) -> None:
    directory = checkpoints.damaged(checkpoint, tmp_path / "bad-model", damage)
    done = server.cli("deploy", "bad", str(directory))
    error = error_line(done.stderr)
    assert done.returncode == 1, done.stdout
    assert any(word.lower() in error.lower() for word in named), error
    assert "unexpected" not in error
    assert "bad" not in server.models()
    assert "Paris" in server.ask(max_tokens=8)


def test_a_missing_directory_is_named(server: Server, tmp_path: Path) -> None:
    missing = tmp_path / "nothing-here"
    done = server.cli("deploy", "bad", str(missing))
    assert done.returncode == 1
    assert str(missing) in error_line(done.stderr)


@pytest.mark.parametrize("source", ["s3://bucket/../x", "hf://org/name/x", "gopher://x"])
def test_an_address_that_names_no_source_is_refused(server: Server, source: str) -> None:
    done = server.cli("deploy", "bad", source)
    assert done.returncode == 1
    assert source.split(":", maxsplit=1)[0] in error_line(done.stderr)


def test_a_taken_name_is_refused_and_can_be_replaced(
    server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    other = tmp_path / "the-same-elsewhere"
    other.symlink_to(checkpoint, target_is_directory=True)
    done = server.cli("deploy", MODEL, str(other))
    assert done.returncode == 1
    assert str(checkpoint) in error_line(done.stderr)
    server.succeed("deploy", MODEL, str(other), "--replace")
    assert server.model()["source"] == str(other)
    assert "Paris" in server.ask(max_tokens=8)
    server.succeed("deploy", MODEL, str(checkpoint), "--replace", "--keep-alive", "300")


def error_line(stderr: str) -> str:
    """The one line of a failed command, after the line that says what it was doing."""
    errors = [line for line in stderr.splitlines() if line.startswith("flashserve: error: ")]
    others = [line for line in stderr.splitlines() if not line.endswith("...")]
    assert len(errors) == 1, stderr
    assert others == errors, stderr
    return errors[0]
