from __future__ import annotations

import ctypes
import errno
import mmap
from pathlib import Path

import pytest

from flashserve.store.sources import cachestat
from flashserve.store.sources.cachestat import num_cached_pages

PAGE = mmap.PAGESIZE


def test_pages_that_were_just_written_are_cached(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 * PAGE + 1))
    with path.open("rb") as file:
        found = num_cached_pages(file.fileno(), 0, 4 * PAGE + 1)
        if found is None:
            pytest.skip("this kernel has no cachestat")
        assert found == 5
        assert num_cached_pages(file.fileno(), PAGE + 10, PAGE) == 2
        assert num_cached_pages(file.fileno(), 100 * PAGE, PAGE) == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EPERM])
def test_a_kernel_that_does_not_say_is_no_error(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        def syscall(self, *arguments: object) -> int:
            ctypes.set_errno(code)
            return -1

    monkeypatch.setattr(cachestat, "_libc", Libc())
    assert num_cached_pages(0, 0, PAGE) is None


def test_a_descriptor_that_is_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    with path.open("rb") as file:
        if num_cached_pages(file.fileno(), 0, 1) is None:
            pytest.skip("this kernel has no cachestat")
    with pytest.raises(OSError, match="descriptor"):
        num_cached_pages(1_000_000, 0, 1)
