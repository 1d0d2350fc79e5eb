"""Bounds that a training process sets on itself, before it loads anything large."""

from __future__ import annotations

import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG = 1
_NICENESS = 19


def bound(cpu_s: int, memory_bytes: int, parent_pid: int) -> None:
    """Give way to everybody, take no more than this, and end with the parent.

    Args:
        cpu_s: of CPU time; beyond it the kernel kills.
        memory_bytes: of data (private pages); beyond it allocations fail.
        parent_pid: of the process that asked; when it has gone already, this one ends at once.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        raise SystemExit("the process that asked for this training has ended")
    os.nice(_NICENESS)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
