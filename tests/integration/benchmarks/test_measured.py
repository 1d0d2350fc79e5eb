"""One load per fresh process, with its bytes checked: the benchmark's harness on a tiny model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import checkpoint
import loader
import measured
import pagecache
from measured import LoadFailedError, Nursery
from stores import open_store

ROWS = {row.loader: row for row in loader.ROWS if row.layout == "single" and row.start != loader.S3}


@dataclasses.dataclass
class Place:
    bench: loader.Bench
    nursery: Nursery


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("loader")
    digests = loader.make_checkpoints(root, checkpoint.TINY)
    (root / "broken").mkdir()
    (root / "broken" / "fastsafetensors.py").write_text("raise ImportError('needs a GPU\\nso')")
    store = open_store(root / "data", 16 << 20, prefault=True)
    try:
        loader.stage(store, root / "models" / "single")
        paths = (str(root / "broken"), os.environ.get("PYTHONPATH"))
        env = {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        with measured.nursery(root, [store.arena.fd], env) as nursery:
            yield Place(loader.Bench(root, checkpoint.TINY, digests, store, {}), nursery)
    finally:
        store.close()


def measure(place: Place, name: str, **changes: Any) -> dict[str, Any]:
    return place.nursery.measure(place.bench.job(ROWS[name]) | changes)


def test_all_ways_bring_the_same_bytes_and_the_same_token(place: Place) -> None:
    names = ("safetensors_load_file", "from_pretrained", "dram_ready", "dram_copy", "from_source")
    results = [measure(place, name) for name in names]  # each compares all tensors' hashes
    assert len({result["token"] for result in results}) == 1
    for result in results:
        assert 0 < result["resident_s"] < result["first_token_s"]
        assert result["peak_rss"] >= result["idle_rss"] > result["pss"] / 2


def test_shards_and_prepared_forms_bring_the_same_bytes(place: Place) -> None:
    loader.prepare_forms(place.bench, place.nursery)
    assert "torch" not in place.bench.prepared
    rows = [row for row in loader.ROWS if row.layout in {"sharded", "torch"}]
    samples = loader.measure_rows(place.bench, place.nursery, rows, repeats=1)
    assert len(samples) == 3
    assert [found.failures for found in samples.values()] == [[]] * 3


def test_other_bytes_than_those_written_are_a_failure(place: Place) -> None:
    wrong = {**place.bench.digests, "lm_head.weight": "0"}
    with pytest.raises(LoadFailedError, match=r"1 tensors .* first lm_head.weight"):
        measure(place, "safetensors_load_file", digests=wrong)


def test_a_peer_that_does_not_import_says_why_in_one_line(place: Place) -> None:
    with pytest.raises(LoadFailedError, match=r"^ImportError: needs a GPU$"):
        measure(place, "fastsafetensors")


def test_a_process_that_is_killed_ends_no_other(place: Place) -> None:
    def kill() -> None:
        (child,) = psutil.Process(place.nursery.pid).children()
        child.kill()

    with pytest.raises(LoadFailedError, match="ended with -9"):
        place.nursery.measure(place.bench.job(ROWS["dram_ready"]), kill)
    assert measure(place, "dram_ready")["token"] >= 0


def test_caches_are_set_once_the_process_waits(place: Place) -> None:
    (file,) = place.bench.path("single").glob("*.safetensors")
    try:
        pagecache.refuse_tmpfs(file.parent)
    except SystemExit as reason:
        pytest.skip(str(reason))
    pages = -(-file.stat().st_size // 4096)
    pagecache.fill(file.parent)
    assert pagecache.resident_pages(file) == pages
    row = ROWS["raw_o_direct"]
    seen = []

    def drop() -> None:
        place.bench.set_caches(row)
        seen.append(pagecache.resident_pages(file))

    place.nursery.measure(place.bench.job(row), drop)
    assert seen == [0]
    assert pagecache.resident_pages(file) == 0  # read past the page cache
