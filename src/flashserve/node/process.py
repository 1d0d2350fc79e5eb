"""Starting, watching and reaping a worker process.

A worker inherits its socket and the arena's descriptor. It dies with the thread that started it
(PR_SET_PDEATHSIG follows the creating thread), so call `spawn` on the main thread.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence

import structlog

from flashserve.config import EngineSettings, NodeSettings

_log = structlog.get_logger()

WORKER_COMMAND = (sys.executable, "-P", "-X", "faulthandler", "-m", "flashserve.node.worker")
_MAX_LINE_BYTES = 2000
_MAX_LINES_PER_S = 50
_REMEMBERED_LINES = 20
_LAST_WORDS_S = 1.0


def threads_per_worker(settings: NodeSettings) -> int:
    """The setting, or the cores that this process may use divided among the workers."""
    if settings.threads_per_worker:
        return settings.threads_per_worker
    return max(1, len(os.sched_getaffinity(0)) // settings.num_workers)


def worker_arguments(
    command: Sequence[str],
    socket_fd: int,
    arena: tuple[int, int],
    num_threads: int,
    settings: EngineSettings,
    device: str,
    references: pathlib.Path,
) -> list[str]:
    """A worker's command line; arena is its descriptor and its size in bytes."""
    return [
        *command,
        f"--parent-pid={os.getpid()}",
        f"--socket-fd={socket_fd}",
        f"--arena-fd={arena[0]}",
        f"--arena-bytes={arena[1]}",
        f"--threads={num_threads}",
        f"--device={device}",
        f"--references={references}",
        f"--settings={settings.model_dump_json()}",
    ]


def _environment(num_threads: int) -> dict[str, str]:
    """Compute threads are fixed before any library starts; no hub is ever asked."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    fixed = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **dict.fromkeys(threads, str(num_threads))}


class WorkerProcess:
    """One child process until it is reaped. Its output goes to the log, line by line, bounded."""

    def __init__(self, popen: subprocess.Popen[bytes], name: str) -> None:
        self.pid = popen.pid
        self.name = name
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._output = _Output(name)
        self._exited: asyncio.Future[int] = self._loop.create_future()
        self._pipe: asyncio.BaseTransport | None = None
        self._pidfd = os.pidfd_open(popen.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    @property
    def last_lines(self) -> tuple[str, ...]:
        return tuple(self._output.recent)

    def kill(self) -> None:
        if not self._exited.done():
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def wait(self) -> int:
        """The exit status, negative for a signal, once the process is gone and reaped."""
        return await asyncio.shield(self._exited)

    async def read_output(self) -> None:
        """Connects the child's output to the log."""
        pipe = self._popen.stdout
        assert pipe is not None
        self._pipe, _ = await self._loop.connect_read_pipe(lambda: self._output, pipe)

    async def finish_output(self) -> None:
        """Reads what an ended child has printed, and closes the pipe."""
        with contextlib.suppress(TimeoutError):  # a grandchild may hold the pipe open
            async with asyncio.timeout(_LAST_WORDS_S):
                await asyncio.shield(self._output.ended)
        if self._pipe is not None:
            self._pipe.close()
        await asyncio.shield(self._output.ended)

    def _reap(self) -> None:
        status = self._popen.wait()  # the descriptor became readable, so this returns at once
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._exited.set_result(status)


class _Output(asyncio.Protocol):
    """Splits what a child prints into lines, and logs no more than a bounded number a second."""

    def __init__(self, name: str) -> None:
        self.recent: collections.deque[str] = collections.deque(maxlen=_REMEMBERED_LINES)
        self._log = _log.bind(worker=name)
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._buffer = b""
        self._second = 0
        self._num_lines = 0

    def data_received(self, data: bytes) -> None:
        *lines, rest = (self._buffer + data).split(b"\n")
        self._buffer = rest[-_MAX_LINE_BYTES:]
        for line in lines:
            self._line(line)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        if self._buffer:
            self._line(self._buffer)
        self.ended.set_result(None)

    def _line(self, line: bytes) -> None:
        text = line[:_MAX_LINE_BYTES].decode(errors="replace").rstrip()
        self.recent.append(text)
        second = int(self._loop.time())
        if second != self._second:
            self._second, self._num_lines = second, 0
        self._num_lines += 1
        if self._num_lines <= _MAX_LINES_PER_S:
            self._log.info("worker_output", line=text)
        elif self._num_lines == _MAX_LINES_PER_S + 1:
            self._log.warning("worker_output_suppressed", max_lines_per_s=_MAX_LINES_PER_S)


def spawn(
    name: str,
    arguments: Callable[[int], Sequence[str]],
    inherited_fds: Sequence[int],
    num_threads: int,
) -> tuple[WorkerProcess, socket.socket]:
    """Starts a child that inherits one end of a new socket pair.

    Args:
        arguments: the command line, given the number of the child's end.
        inherited_fds: further descriptors that the child gets, under the same numbers.

    Returns:
        The process, and our end of the pair.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        popen = subprocess.Popen(  # noqa: S603  # our own program
            arguments(theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=_environment(num_threads),
            pass_fds=(theirs.fileno(), *inherited_fds),
            close_fds=True,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return WorkerProcess(popen, name), ours
