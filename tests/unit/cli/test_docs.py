"""Every command, setting, error and metric is in docs/reference, and nothing else is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pydantic
import typer.main

from flashserve import errors
from flashserve.cli.main import app
from flashserve.config import Settings
from flashserve.live.requests import Receipt
from flashserve.telemetry import render_metrics
from flashserve.types import Phases

DOCS = Path(__file__).parents[3] / "docs"


def settings_of(section: type[pydantic.BaseModel], prefix: str = "") -> set[str]:
    names: set[str] = set()
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            names |= settings_of(field.annotation, f"{prefix}{name}.")
        else:
            names.add(prefix + name)
    return names


def first_cells(page: str) -> list[str]:
    """What stands in code style in the first column of a page's tables."""
    return re.findall(r"^\| `([^`]+)`", page, flags=re.MULTILINE)


def test_every_command_and_option_is_documented() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    sections = {part.split()[0]: part for part in page.split("\n## flashserve ")[1:]}
    commands = typer.main.get_command(app).commands
    assert set(sections) == set(commands)
    for name, command in commands.items():
        members = getattr(command, "commands", {"": command}).values()
        options = {o for c in members for p in c.params for o in p.opts if o.startswith("--")}
        mentioned = set(re.findall(r"--[a-z][a-z-]*", sections[name]))
        assert mentioned <= options, f"{name}: {mentioned - options}"
        missing = options - mentioned - {"--help", "--json", "--url"}
        assert not missing, f"{name}: {missing}"


def test_every_setting_is_documented_with_its_default() -> None:
    page = (DOCS / "reference" / "configuration.md").read_text()
    documented = [name for name in first_cells(page) if not name.startswith("FLASHSERVE_")]
    assert sorted(documented) == sorted(settings_of(Settings))
    assert len(documented) == len(set(documented))
    for name, shown in re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", page, flags=re.MULTILINE):
        value: object = Settings.model_construct()
        for part in name.split("."):
            value = getattr(value, part)
        if isinstance(value, tuple):
            assert shown == ", ".join(value), name
        elif name != "data_dir":
            assert shown.lower() == str(value).lower(), name


def test_every_error_is_documented_with_its_status() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    documented = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", page, flags=re.MULTILINE))
    classes = [c for c in vars(errors).values() if isinstance(c, type)]
    raised = {c.code: str(c.status) for c in classes if issubclass(c, errors.FlashServeError)}
    assert documented == raised


def test_every_field_of_a_receipt_is_documented() -> None:
    page = (DOCS / "reference" / "http-api.md").read_text()
    documented = set(re.findall(r"`(\w+)`", page))
    fields = {*Receipt.__dataclass_fields__, *Phases.__struct_fields__}
    assert fields <= documented, fields - documented


def test_every_metric_is_documented() -> None:
    page = (DOCS / "how-to" / "scrape-metrics.md").read_text()
    documented = set(re.findall(r"`(flashserve_\w+)`", page))
    served = re.findall(r"^# HELP (\w+)", render_metrics([]).decode(), flags=re.MULTILINE)
    assert documented == {name for name in served if not name.endswith("_created")}


def test_architecture_names_things_that_exist() -> None:
    source = DOCS.parent / "src" / "flashserve"
    page = (DOCS.parent / "ARCHITECTURE.md").read_text()
    packages = "|".join(path.name for path in source.iterdir() if path.is_dir())
    names = re.findall(rf"`((?:{packages})(?:\.\w+)+)`", page)
    assert len(names) > 40
    missing = [name for name in names if not is_defined(source, name.split("."))]
    assert not missing


def is_defined(directory: Path, parts: list[str]) -> bool:
    """A package, a module, or what it defines, looked up in the source without importing it."""
    here = directory / parts[0]
    if here.is_dir():
        return len(parts) == 1 or is_defined(here, parts[1:])
    module = here.with_suffix(".py")
    return module.is_file() and defines(ast.parse(module.read_text()), parts[1:])


def defines(scope: ast.AST, parts: list[str]) -> bool:
    if not parts:
        return True
    named = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n for n in ast.iter_child_nodes(scope) if isinstance(n, named) and n.name == parts[0]]
    return any(defines(node, parts[1:]) for node in found)
