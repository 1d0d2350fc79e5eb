"""The worker process: `python -m flashserve.node.worker`, started by an agent (node/process.py).

Generic and started ahead: when it says `ready`, its imports are done, the arena is mapped, the KV
pool is in memory and a forward has run, so that any model needs only to be bound.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import logging
import os
import pathlib
import signal
import socket
import sys
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_EXIT_PARENT_GONE = 0
_EXIT_ENGINE = 70
_NICENESS = 5
"""Computing gives way to the server's passing of requests and tokens, which is short."""
_SWITCH_INTERVAL_S = 0.0005
"""The link's receiving thread gets its turn so soon, also while a step runs."""

_log = logging.getLogger("flashserve.worker")


def die_with_parent(parent_pid: int) -> None:
    """The kernel kills this process when its parent ends; exits if that has happened already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(_EXIT_PARENT_GONE)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="flashserve.node.worker", description=__doc__)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--arena-fd", type=int, required=True)
    parser.add_argument("--arena-bytes", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--references", type=pathlib.Path, help="of the self-checks")
    parser.add_argument("--settings", type=json.loads, required=True, help="EngineSettings")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    die_with_parent(arguments.parent_pid)
    os.nice(_NICENESS)  # before there are threads, which inherit it
    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    link_socket = socket.socket(fileno=arguments.socket_fd)
    # Imported only now: the tensor library takes seconds, in which the parent may die.
    from flashserve.config import EngineSettings
    from flashserve.errors import UnavailableError, WireError
    from flashserve.node.hosting import start_host
    from flashserve.node.link import Link
    from flashserve.node.serving import EngineUnusableError, Serving

    try:
        host, ready = start_host(
            arguments.arena_fd,
            arguments.arena_bytes,
            arguments.threads,
            EngineSettings.model_validate(arguments.settings),
            arguments.device,
            arguments.references,
        )
    except UnavailableError as error:
        _log.critical("the worker cannot start: %s", error)
        return _EXIT_ENGINE
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        Serving(Link(link_socket), host, ready).run()
    except ConnectionError:
        return _EXIT_PARENT_GONE
    except (EngineUnusableError, WireError) as error:
        _log.critical("the worker ends: %s", error)
    return _EXIT_ENGINE


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # tearing down the tensor library takes long and gives nothing back
