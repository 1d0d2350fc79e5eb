"""One converted model for all end-to-end tests, and one server for those that do not harm it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e.harness import MODEL, Server, running

REPOSITORY = Path(__file__).parents[2]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last of all, because other tests check that they leave no process of this one behind."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
    items.sort(key=lambda item: here in item.path.parents)


@pytest.fixture(scope="session")
def checkpoint() -> Path:
    """The real small model, converted once per clone."""
    path = REPOSITORY / ".demo" / "models" / "smollm2"
    subprocess.run([sys.executable, "-m", "flashserve.store.sources.demo", str(path)], check=True)
    return path


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Server]:
    """A server with the model deployed, shared by the tests that leave both as they were.

    It has the policy of any server. The model has a keep-alive of its own, so that no forecast
    stops it between two steps of a test.
    """
    with running(POLICY__NAME="") as started:
        started.deploy(MODEL, checkpoint, keep_alive_s=300)
        yield started
        assert started.stop() == 0, started.log()
