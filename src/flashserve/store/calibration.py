"""Measures what this machine's tiers give, so that predictions start from facts.

Everything is measured as the store does it: reads go through the store's own readers, into memory
that was faulted in before. Each figure is the median of a few rounds.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import mmap
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import blake3
import msgspec
import numpy as np
import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import InputError, SourceError
from flashserve.store.checkpoint.files import one_line
from flashserve.store.checkpoint.listing import CHUNK_BYTES, FileReader, Source, SourceFile
from flashserve.store.sources.reading import LocalReader, file_identity

FILE_NAME = "calibration.json"
NUM_ROUNDS = 3
_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_MAX_FILE_BYTES = 1 << 16

_Rate = Annotated[float, msgspec.Meta(gt=0, le=1e15)]


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes per second, unless said otherwise; remote is None where no source was given.

    disk: cold, past the page cache. dram: what a worker needs to reach a model's bytes in shared
    memory (page tables of a new mapping). compute_at_once: as many threads' worth of weights as all
    cores together read at once, which is what workers of one core each share.
    load_compute_s_per_byte: of a core, to copy, check and digest what comes to DRAM. Both are None
    in files of earlier versions. The other figures are for the reader.
    """

    measured_at: str
    machine: str
    num_bytes: int
    disk_bytes_per_s: _Rate
    dram_bytes_per_s: _Rate
    remote_bytes_per_s: _Rate | None = None
    page_cache_bytes_per_s: _Rate
    copy_bytes_per_s: _Rate
    fault_bytes_per_s: _Rate
    checksum_bytes_per_s: _Rate
    compute_at_once: Annotated[float, msgspec.Meta(ge=1, le=1e4)] | None = None
    load_compute_s_per_byte: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None


def read_calibration(data_dir: Path) -> Calibration | None:
    """What was measured here before, if anything.

    Raises:
        InputError: the file is damaged; measuring again replaces it.
    """
    path = data_dir / FILE_NAME
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_FILE_BYTES), type=Calibration)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} cannot be used ({one_line(error)}): run `flashserve calibrate` again"
        ) from None


def write_calibration(data_dir: Path, calibration: Calibration) -> Path:
    """Replaces what was measured before, whole or not at all.

    Raises:
        InputError: the data directory cannot be written.
    """
    path = data_dir / FILE_NAME
    data = msgspec.json.format(msgspec.json.encode(calibration), indent=2) + b"\n"
    try:
        with tempfile.NamedTemporaryFile(dir=data_dir, prefix=".calibration-", delete=False) as new:
            new.write(data)
        Path(new.name).replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {one_line(error)}") from None
    return path


def calibrate_tiers(
    data_dir: Path,
    num_bytes: int,
    settings: StoreSettings,
    remote: Source | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Calibration:
    """Takes some seconds and as much disk and memory as twice `num_bytes`, given back at the end.

    Args:
        data_dir: measured is the disk that holds it.
        num_bytes: moved in each round; whole chunks of 8 MiB.
        remote: a source whose first `num_bytes` are fetched as well.
        progress: told what is being measured.

    Raises:
        InputError: the disk or memory for it cannot be had.
        SourceError, CheckpointError: the remote source cannot be read.
    """
    num_bytes = max(num_bytes // CHUNK_BYTES, 1) * CHUNK_BYTES
    try:
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".calibration-") as directory:
            return _measure(Path(directory), num_bytes, settings, remote, progress)
    except OSError as error:
        raise InputError(
            f"measuring with {num_bytes} bytes in {data_dir} failed: {one_line(error)}"
        ) from None


def _measure(
    directory: Path,
    num_bytes: int,
    settings: StoreSettings,
    remote: Source | None,
    progress: Callable[[str], None],
) -> Calibration:
    progress("page faults")
    fault = _median(lambda: _fault_seconds(num_bytes))
    progress("shared memory")
    attached = _attach_seconds(num_bytes)
    with _resident(num_bytes) as memory, memoryview(memory) as view:
        progress("copies in memory")
        copied = _copy_seconds(view)
        summed = _median(lambda: _seconds(lambda: xxhash.xxh3_64_intdigest(view)))
        digested = _median(lambda: _seconds(lambda: blake3.blake3(view).digest()))
        progress("all cores")
        at_once = _threads_at_once(view)
        progress("writing to disk")
        file = _write(directory / "bytes", view)
        progress("disk")
        disk = _median(lambda: _disk_seconds(directory, file, view, settings))
        progress("page cache")
        (directory / file.name).read_bytes()
        began_s = time.process_time()
        cached = _median(lambda: _read_seconds(LocalReader(directory, file, settings), file, view))
        computed = (time.process_time() - began_s) / NUM_ROUNDS + summed + digested
        fetched = None
        if remote is not None:
            progress(f"remote: {remote.uri}")
            fetched = _remote_rate(remote, view)
    return Calibration(
        measured_at=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPUs",
        num_bytes=num_bytes,
        disk_bytes_per_s=num_bytes / disk,
        dram_bytes_per_s=num_bytes / attached,
        remote_bytes_per_s=fetched,
        page_cache_bytes_per_s=num_bytes / cached,
        copy_bytes_per_s=num_bytes / copied,
        fault_bytes_per_s=num_bytes / fault,
        checksum_bytes_per_s=num_bytes / summed,
        compute_at_once=at_once,
        load_compute_s_per_byte=computed / num_bytes,
    )


def _median(measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(NUM_ROUNDS))


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return max(time.perf_counter() - begin, 1e-9)


def _resident(num_bytes: int) -> mmap.mmap:
    """Private memory that the kernel has given already."""
    memory = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(_MADV_POPULATE_WRITE)
    return memory


def _shared(num_bytes: int) -> int:
    descriptor = os.memfd_create("flashserve-calibration", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def _fault_seconds(num_bytes: int) -> float:
    """Taking fresh shared memory from the kernel."""
    descriptor = _shared(num_bytes)
    try:
        with mmap.mmap(descriptor, num_bytes) as memory:
            return _seconds(lambda: memory.madvise(_MADV_POPULATE_WRITE))
    finally:
        os.close(descriptor)


def _copy_seconds(source: memoryview) -> float:
    """One thread's copy between resident buffers; fills `source` with random bytes first."""
    with _resident(source.nbytes) as memory:
        values = np.frombuffer(source, np.uint64)
        values[:] = np.random.default_rng(0).integers(2**63, size=len(values))
        # No view of the memory outlives its copy, or it could not be closed.
        return _median(
            lambda: _seconds(lambda: np.copyto(np.frombuffer(memory, np.uint64), values))
        )


def _threads_at_once(source: memoryview) -> float:
    """How many threads' worth of reading and adding all cores do together, 1 at least.

    What a step of an engine does, in so far as the memory limits it: the weights stream past.
    """
    num_cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.frombuffer(source, np.uint64), num_cores)
    alone = _median(lambda: _seconds(parts[0].sum))
    with concurrent.futures.ThreadPoolExecutor(num_cores) as pool:
        together = _median(lambda: _seconds(lambda: list(pool.map(np.sum, parts))))
    return min(max(num_cores * alone / together, 1.0), float(num_cores))


def _attach_seconds(num_bytes: int) -> float:
    """Walking resident shared memory through a new mapping."""

    def attach() -> float:
        with mmap.mmap(descriptor, num_bytes, prot=mmap.PROT_READ) as memory:
            return _seconds(lambda: memory.madvise(_MADV_POPULATE_READ))

    descriptor = _shared(num_bytes)
    try:
        with mmap.mmap(descriptor, num_bytes) as memory:
            memory.madvise(_MADV_POPULATE_WRITE)
        return _median(attach)
    finally:
        os.close(descriptor)


def _write(path: Path, data: memoryview) -> SourceFile:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return SourceFile(path.name, data.nbytes, file_identity(path.resolve(), path.stat()))


def _disk_seconds(
    directory: Path, file: SourceFile, target: memoryview, settings: StoreSettings
) -> float:
    """Reading a file of which the page cache holds nothing."""
    with (directory / file.name).open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return _read_seconds(LocalReader(directory, file, settings), file, target)


def _read_seconds(reader: FileReader, file: SourceFile, target: memoryview) -> float:
    """Reading the beginning of a file, as much as `target` holds, by the reader's threads."""
    num_bytes = min(file.num_bytes, target.nbytes)
    position = itertools.count(0, reader.preferred_bytes)

    def read() -> None:
        while (begin := next(position)) < num_bytes:
            end = min(begin + reader.preferred_bytes, num_bytes)
            with target[begin:end] as piece:
                reader.read(begin, piece)

    try:
        threads = reader.preferred_threads
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            begin = time.perf_counter()
            for done in [pool.submit(read) for _ in range(threads)]:
                done.result()
            return max(time.perf_counter() - begin, 1e-9)
    finally:
        reader.close()


def _remote_rate(source: Source, target: memoryview) -> float:
    """Bytes per second of the largest file of a remote source; one round, since it may cost."""
    file = max(source.listing().files, key=lambda file: file.num_bytes, default=None)
    if file is None or not file.num_bytes:
        raise SourceError(f"source {source.uri} has no file to measure with")
    seconds = _read_seconds(source.open(file), file, target)
    return min(file.num_bytes, target.nbytes) / seconds
