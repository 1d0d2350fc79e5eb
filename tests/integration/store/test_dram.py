"""What another Unix user can do with the arena, and with copies out of it: nothing."""

import json
import mmap
import os
import subprocess
import sys

import pytest

from flashserve.store.dram.arena import EXTENT_ALIGNMENT, Arena

pytestmark = pytest.mark.integration

NOBODY = 65534

# Becomes another user, or stays, and tries every path to the memory of its parent. A process that
# changed its user may not look at its own /proc entries until it is made dumpable again.
INTRUDER = """
import ctypes, json, os, sys

user, parent, begin, end, *fds = sys.argv[1:]
if int(user):
    os.setgroups([])
    os.setgid(int(user))
    os.setuid(int(user))
    assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
found = {}
paths = {f"parent {fd}": f"/proc/{parent}/fd/{fd}" for fd in fds}
paths |= {f"own {fd}": f"/proc/self/fd/{fd}" for fd in fds}
paths |= {"map": f"/proc/{parent}/map_files/{begin}-{end}", "mem": f"/proc/{parent}/mem"}
for name, path in paths.items():
    for flags, mode in ((os.O_RDONLY, "read"), (os.O_RDWR, "write")):
        try:
            os.close(os.open(path, flags))
            found[f"{mode} {name}"] = "opened"
        except PermissionError:
            found[f"{mode} {name}"] = "refused"
print(json.dumps(found))
"""


def attempts(user: int, address: int, num_bytes: int, fds: list[int]) -> dict[str, str]:
    """What a process of `user` (0: of this one) that inherited `fds` gets to open."""
    numbers = [str(user), str(os.getpid()), f"{address:x}", f"{address + num_bytes:x}"]
    done = subprocess.run(
        [sys.executable, "-c", INTRUDER, *numbers, *map(str, fds)],
        pass_fds=fds,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_can_open_neither_the_arena_nor_a_copy():
    """A memfd that was made without care is opened by the same user, so the attempt is real."""
    arena = Arena(4 * EXTENT_ALIGNMENT)
    extent = arena.allocate(EXTENT_ALIGNMENT)
    arena.seal(extent)
    copy = arena.copy_out([(extent.offset, extent.num_bytes)])
    careless = os.memfd_create("flashserve-test")
    fds = [arena.fd, copy]
    try:
        where = arena._address, arena.num_bytes
        assert set(attempts(NOBODY, *where, fds).values()) == {"refused"}
        assert attempts(NOBODY, *where, [careless])[f"write own {careless}"] == "opened"
        own = attempts(0, *where, fds)
        assert {own[f"read parent {fd}"] for fd in fds} == {"opened"}
        assert own["read map"] == own["read mem"] == "opened"
    finally:
        for fd in (copy, careless):
            os.close(fd)
        arena.close()


# Tries to write the memory behind each descriptor, as it is and opened anew through /proc.
WRITER = """
import json, mmap, os, sys

num_bytes, *fds = map(int, sys.argv[1:])
outcomes = []
for fd in fds:
    for target in (fd, os.open(f"/proc/self/fd/{fd}", os.O_RDWR)):
        for attempt in (
            lambda: mmap.mmap(target, num_bytes, mmap.MAP_SHARED, mmap.PROT_WRITE),
            lambda: mmap.mmap(target, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
            lambda: os.pwrite(target, b"x", 0),
            lambda: os.posix_fallocate(target, 0, 2 * num_bytes),
            lambda: os.truncate(f"/proc/self/fd/{target}", 0),
        ):
            try:
                attempt()
                outcomes.append("done")
            except OSError as error:
                outcomes.append(type(error).__name__)
        private = mmap.mmap(target, num_bytes, mmap.MAP_PRIVATE)
        private[:5] = b"other"
print(json.dumps(outcomes))
"""


def test_no_reader_can_write_even_after_opening_anew():
    arena = Arena(EXTENT_ALIGNMENT)
    extent = arena.allocate(EXTENT_ALIGNMENT)
    with arena.memory(extent) as memory:
        memory[:5] = b"owner"
    arena.seal(extent)
    copy = arena.copy_out([(extent.offset, extent.num_bytes)])
    try:
        fds = [arena.fd, copy]
        done = subprocess.run(
            [sys.executable, "-c", WRITER, str(arena.num_bytes), *map(str, fds)],
            pass_fds=fds,
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == ["PermissionError"] * 20
        with arena.memory(extent) as memory:
            assert memory[:5] == b"owner"
        with mmap.mmap(copy, 0, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
            assert mapping[:5] == b"owner"
    finally:
        os.close(copy)
        arena.close()
