from __future__ import annotations

import os
import pathlib
import signal
import socket
import stat
import subprocess
import sys

import pytest

from flashserve.errors import ConflictError, InputError
from flashserve.node.sockets import bind_unix_socket


def can_connect(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


def test_only_its_user_can_reach_the_socket(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "data" / "run" / "some.sock"
    listener = bind_unix_socket(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert can_connect(path)
    listener.close()
    assert not path.exists()


def test_a_second_server_is_told_who_has_the_path(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "some.sock"
    listener = bind_unix_socket(path)
    with pytest.raises(ConflictError, match=f"process {os.getpid()}"):
        bind_unix_socket(path)
    assert can_connect(path)
    listener.close()
    bind_unix_socket(path).close()


def test_a_path_that_a_killed_server_left_is_taken_over(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "some.sock"
    program = (
        "import pathlib, sys, time; from flashserve.node.sockets import bind_unix_socket;"
        "kept = bind_unix_socket(pathlib.Path(sys.argv[1])); print(flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        with pytest.raises(ConflictError, match=f"process {server.pid}"):
            bind_unix_socket(path)
        server.send_signal(signal.SIGKILL)
    assert path.exists()
    assert not can_connect(path)
    listener = bind_unix_socket(path)
    assert can_connect(path)
    listener.close()


def test_a_directory_open_to_others_is_refused(tmp_path: pathlib.Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    with pytest.raises(InputError, match=f"chmod 700 {shared}"):
        bind_unix_socket(shared / "some.sock")


def test_a_path_too_long_for_a_socket_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="shorter data_dir"):
        bind_unix_socket(tmp_path / ("long" * 30) / "some.sock")


def test_a_path_that_cannot_be_listened_on_is_named(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "some.sock"
    path.mkdir()
    with pytest.raises(InputError, match="cannot listen on"):
        bind_unix_socket(path)
    path.rmdir()
    bind_unix_socket(path).close()
