import os
import threading

import numpy as np
import pytest
import xxhash

from flashserve.errors import CheckpointError, UnavailableError
from flashserve.store import disk
from flashserve.store.disk import read_image
from flashserve.store.layout import Layout, read_layout


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(disk, "CHUNK_BYTES", 1000)


def read(directory, layout: Layout, **options) -> tuple[bytearray, tuple[int, ...]]:
    image = bytearray(layout.image_bytes)
    options.setdefault("stopping", threading.Event())
    with memoryview(image) as view:
        return image, read_image(directory, layout, view, **options)


def test_every_file_lies_verbatim_in_its_place(
    tmp_path, write_checkpoint, two_shards, small_chunks
):
    layout = read_layout(write_checkpoint(tmp_path, two_shards))
    image, checksums = read(tmp_path, layout)
    for file, offset in zip(layout.files, layout.file_offsets, strict=True):
        assert image[offset : offset + file.num_bytes] == (tmp_path / file.name).read_bytes()
    pieces = [
        (tmp_path / layout.files[chunk.file_index].name).read_bytes()[
            chunk.begin : chunk.begin + chunk.num_bytes
        ]
        for chunk in disk.chunks(layout)
    ]
    assert sum(map(len, pieces)) == layout.size_bytes
    assert list(checksums) == [xxhash.xxh3_64_intdigest(piece) for piece in pieces]


def test_progress_ends_with_everything(tmp_path, write_checkpoint, small_chunks):
    layout = read_layout(write_checkpoint(tmp_path, 50_000))
    calls: list[tuple[int, int]] = []
    read(tmp_path, layout, progress=lambda *call: calls.append(call))
    assert calls == sorted(calls)
    assert len(calls) == len(list(disk.chunks(layout)))
    assert calls[-1] == (layout.size_bytes, layout.size_bytes)


def test_short_reads_are_continued(tmp_path, write_checkpoint, small_chunks, monkeypatch):
    """The kernel may return less than asked, at any place."""
    layout = read_layout(write_checkpoint(tmp_path, 5000))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:77]], at))
    image, _ = read(tmp_path, layout)
    assert image[: layout.size_bytes] == (tmp_path / "model.safetensors").read_bytes()


def test_a_file_that_shrank_is_named(tmp_path, write_checkpoint, small_chunks):
    layout = read_layout(write_checkpoint(tmp_path, 5000))
    os.truncate(tmp_path / "model.safetensors", 3000)
    with pytest.raises(CheckpointError, match=r"model\.safetensors became shorter"):
        read(tmp_path, layout)


def test_a_file_that_went_is_named(tmp_path, write_checkpoint):
    layout = read_layout(write_checkpoint(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        read(tmp_path, layout)


def test_one_failure_ends_all_readers(tmp_path, write_checkpoint, small_chunks):
    layout = read_layout(write_checkpoint(tmp_path, 5_000_000))
    calls = []

    def fail(*call: int) -> None:
        calls.append(call)
        if len(calls) == 1:
            raise KeyError("told so")

    with pytest.raises(KeyError):
        read(tmp_path, layout, progress=fail)
    assert len(calls) < len(list(disk.chunks(layout)))


def test_reading_stops_when_told(tmp_path, write_checkpoint, small_chunks):
    layout = read_layout(write_checkpoint(tmp_path, 1_000_000))
    stopping = threading.Event()
    calls = []

    def stop(*call: int) -> None:
        calls.append(call)
        stopping.set()

    with pytest.raises(UnavailableError, match="closing"):
        read(tmp_path, layout, stopping=stopping, progress=stop)
    assert len(calls) <= disk.NUM_READERS


def test_an_empty_checkpoint_is_read(tmp_path, write_checkpoint):
    layout = read_layout(
        write_checkpoint(tmp_path, {"model.safetensors": {"none": np.zeros((0,), np.float32)}})
    )
    image, _ = read(tmp_path, layout)
    assert image[: layout.size_bytes] == (tmp_path / "model.safetensors").read_bytes()
