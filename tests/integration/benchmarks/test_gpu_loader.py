"""The accelerator's benchmark, tried on a processor with a tiny model."""

from __future__ import annotations

import json

import pytest
import torch

import gpu_loader
from flashserve.store.device.copier import CpuCopier
from gpu_checkpoint import DRY, Bench
from gpu_items import compare_bytes

torch.set_num_threads(1)

ON_CUDA_ALONE = {"graph", "overlap"}


def test_a_dry_run_measures_every_item_that_needs_no_device(tmp_path, capsys):
    lines, file = tmp_path / "lines.jsonl", tmp_path / "report.json"
    assert gpu_loader.main(["--dry-run", "--lines", str(lines), "--json", str(file)]) == 0
    found = {line["item"]: line for line in map(json.loads, lines.read_text().splitlines())}
    assert list(found) == [item.__name__ for item, _ in gpu_loader.ITEMS]
    assert {name for name, line in found.items() if "error" in line} == ON_CUDA_ALONE
    assert not any("release_error" in line for line in found.values())
    values = json.loads(file.read_text())["values"]
    assert values["load_gb_per_s"]["value"] > 0
    assert {entry["aim"] for entry in values.values()} == {None}
    assert "a dry run" in capsys.readouterr().out


def test_an_item_that_fails_or_takes_too_long_does_not_end_the_others(monkeypatch, tmp_path):
    def failing(bench):
        bench.take()
        raise RuntimeError("no such\nthing")

    def endless(_):
        while True:
            pass

    def last(bench):
        return {"is_empty": bench.residents.asleep == (), "names": len(bench.take().state_dict())}

    items = ((failing, 60), (endless, 0.01), (last, 60))
    monkeypatch.setattr(gpu_loader, "ITEMS", items)
    bench = Bench(CpuCopier(), DRY)
    lines = tmp_path / "lines.jsonl"
    found = gpu_loader.measure(bench, 60, lines)
    assert found["failing"]["error"] == "RuntimeError: no such thing"
    assert found["endless"]["error"].startswith("TimeoutError")
    assert found["last"] == {**found["last"], "is_empty": True, "names": len(bench.tensors)}
    assert len(lines.read_text().splitlines()) == 3


def test_damaged_bytes_are_an_error_of_the_item():
    bench = Bench(CpuCopier(), DRY)
    bench.take()
    views = bench.residents.awake().residence.views()
    compare_bytes(bench, views)
    views["model.norm.weight"].view(torch.uint8)[3] ^= 1
    with pytest.raises(AssertionError, match=r"model\.norm\.weight arrived damaged"):
        compare_bytes(bench, views)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device_one_line_says_so(capsys):
    assert gpu_loader.main([]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing measured: torch finds no CUDA device")
