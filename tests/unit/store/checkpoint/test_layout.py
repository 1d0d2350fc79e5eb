import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint import layout
from flashserve.store.checkpoint.layout import read_layout

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_layout(directory)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_tensors_are_listed_where_they_lie(tmp_path, write_checkpoint):
    tensors = {
        "norm": np.arange(3, dtype=np.float32),
        "table": np.arange(8, dtype=np.float16).reshape(4, 2),
        "empty": np.zeros((0, 4), dtype=np.int8),
    }
    write_checkpoint(tmp_path, {"model.safetensors": tensors})
    found = read_layout(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    assert found.size_bytes == found.files[0].num_bytes == len(data)
    assert {tensor.name for tensor in found.tensors} == set(tensors)
    for tensor in found.tensors:
        assert data[tensor.begin : tensor.end] == tensors[tensor.name].tobytes()
        assert tensor.shape == tensors[tensor.name].shape
    assert {tensor.name: tensor.dtype for tensor in found.tensors}["table"] == "F16"


def test_shards_are_read_through_their_index(tmp_path, write_checkpoint, two_shards):
    write_checkpoint(tmp_path, two_shards)
    found = read_layout(tmp_path)
    assert [file.name for file in found.files] == sorted(two_shards)
    for tensor in found.tensors:
        name = found.files[tensor.file_index].name
        piece = (tmp_path / name).read_bytes()[tensor.begin : tensor.end]
        assert piece == two_shards[name][tensor.name].tobytes()


def test_files_lie_page_aligned_and_apart_in_the_image(tmp_path, write_checkpoint, two_shards):
    write_checkpoint(tmp_path, two_shards)
    found = read_layout(tmp_path)
    first, second = found.file_offsets
    assert first == 0
    assert second % layout.FILE_ALIGNMENT == 0
    assert found.files[0].num_bytes <= second < found.files[0].num_bytes + layout.FILE_ALIGNMENT
    assert found.image_bytes == second + layout.FILE_ALIGNMENT


def test_a_single_file_goes_before_an_index(tmp_path, write_checkpoint, write_index):
    write_checkpoint(tmp_path)
    write_index(tmp_path, {"weight_map": {"weight": "elsewhere.safetensors"}})
    assert [file.name for file in read_layout(tmp_path).files] == ["model.safetensors"]


BAD_FILES = {
    "empty": (b"", "truncated"),
    "shorter than a length": (b"\x01\x00\x00", "truncated"),
    "length beyond the file": (b"\xff\x00\x00\x00\x00\x00\x00\x00{}", "header claims 255"),
    "length of 2^63": (b"\x00" * 7 + b"\x80" + b"{}", f"header claims {1 << 63}"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_length_is_refused(tmp_path, case):
    data, reason = BAD_FILES[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    message = refusal(tmp_path)
    assert "model.safetensors" in message
    assert reason in message


def test_a_huge_header_is_refused_before_it_is_read(tmp_path, craft):
    path = craft(tmp_path / "model.safetensors", {}, length=layout.MAX_HEADER_BYTES + 1)
    os.truncate(path, 2 * layout.MAX_HEADER_BYTES)
    assert f"at most {layout.MAX_HEADER_BYTES}" in refusal(tmp_path)


def tensor(dtype="F32", shape=(2,), data_offsets=(0, 8), **extra):
    return {"dtype": dtype, "shape": shape, "data_offsets": data_offsets, **extra}


BAD_HEADERS = {
    "not UTF-8": (b'{"\xff\xfe": 1}', "not UTF-8"),
    "not JSON": (b"{", "not JSON"),
    "deeply nested": (b"[" * 200_000, "not JSON"),
    "a number of many digits": (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    "an array": ([], "not a JSON object"),
    "an entry that is no object": ({"a": 3}, "'a'"),
    "an unknown field": ({"a": tensor(stride=[1])}, "stride"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2]}}, "data_offsets"),
    "an unknown type": ({"a": tensor("Q7")}, "unknown type 'Q7'"),
    "a negative dimension": ({"a": tensor(shape=[-2])}, "'a'"),
    "a fractional dimension": ({"a": tensor(shape=[2.5])}, "'a'"),
    "a boolean dimension": ({"a": tensor(shape=[True, 2])}, "'a'"),
    "too many dimensions": ({"a": tensor(shape=[1] * 100)}, "'a'"),
    "negative offsets": ({"a": tensor(data_offsets=[-8, 0])}, "'a'"),
    "three offsets": ({"a": tensor(data_offsets=[0, 4, 8])}, "'a'"),
    "offsets in reverse": ({"a": tensor(data_offsets=[8, 0])}, "bytes 8 to 0"),
    "offsets of 2^64": ({"a": tensor(data_offsets=[1 << 64, 8 + (1 << 64)])}, "'a'"),
    "offsets near 2^63": ({"a": tensor(data_offsets=[2**63 - 9, 2**63 - 1])}, "ends at byte"),
    "a range that ends outside": ({"a": tensor(shape=[4], data_offsets=[0, 16])}, "ends at byte"),
    "a shape that wants more": ({"a": tensor(shape=[3])}, "cannot take bytes 0 to 8"),
    "a type that wants less": ({"a": tensor("F16")}, "cannot take bytes 0 to 8"),
    "a shape that overflows": ({"a": tensor(shape=[1 << 62, 1 << 62])}, "cannot take"),
    "half a byte": ({"a": tensor("F4", [3], [0, 1])}, "cannot take"),
    "a gap at the start": ({"a": tensor(shape=[1], data_offsets=[4, 8])}, "gap"),
    "a gap between": (
        {"a": tensor("U8", [1], [0, 1]), "b": tensor("U8", [6], [2, 8])},
        "tensor 'b' leaves a gap",
    ),
    "bytes at the end": ({"a": tensor(shape=[1], data_offsets=[0, 4])}, "4 bytes after"),
    "no tensor, but data": ({}, "8 bytes after"),
    "an overlap": (
        {"a": tensor("U8", [5], [0, 5]), "b": tensor("U8", [4], [4, 8])},
        "tensor 'b' overlaps",
    ),
    "one range twice": ({"a": tensor(), "b": tensor()}, "overlaps"),
    "one name twice": (
        b'{"a": %b, "a": %b}' % (json.dumps(F32).encode(), json.dumps(F32).encode()),
        "'a' twice",
    ),
    "one field twice": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' twice"),
    "a name that is no text": (b'{"\\ud800": %b}' % json.dumps(F32).encode(), "surrogates"),
    "a name of several lines": ({"a\nb": tensor("Q7")}, r"'a\nb'"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused(tmp_path, craft, case):
    header, reason = BAD_HEADERS[case]
    craft(tmp_path / "model.safetensors", header, bytes(8))
    message = refusal(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert reason in message


def test_what_the_safetensors_package_refuses_is_refused(tmp_path, craft):
    """The reader that others use is the oracle: nothing that it finds damaged passes here."""
    for case, (header, _) in BAD_HEADERS.items():
        path = craft(tmp_path / case.replace(" ", "-") / "model.safetensors", header, bytes(8))
        try:
            safetensors.deserialize(path.read_bytes())
        except Exception:
            refusal(path.parent)


def test_a_truncated_file_is_refused(tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path) / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    assert "truncated" in refusal(tmp_path)


def test_a_missing_shard_is_named(tmp_path, write_checkpoint, two_shards):
    write_checkpoint(tmp_path, two_shards)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "model-00002-of-00002.safetensors is missing" in refusal(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path, write_checkpoint, write_index):
    write_checkpoint(tmp_path, {"x.safetensors": {"a": np.zeros(1)}})
    write_index(tmp_path, {"weight_map": {"a": "x.safetensors", "ghost": "x.safetensors"}})
    message = refusal(tmp_path)
    assert "x.safetensors lacks tensor 'ghost'" in message


@pytest.mark.parametrize("listed", [True, False])
def test_a_tensor_in_two_shards_is_refused(tmp_path, write_checkpoint, write_index, listed):
    shards = {f"{name}.safetensors": {"same": np.zeros(1), name: np.zeros(1)} for name in "xy"}
    write_checkpoint(tmp_path, shards)
    if not listed:
        write_index(tmp_path, {"weight_map": {name: f"{name}.safetensors" for name in "xy"}})
    assert "'same'" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/outside.safetensors",
        "a/../../x.safetensors",
        "sub/x.safetensors",
        "",
        ".",
        "pytorch_model.bin",
        "a\x00.safetensors",
    ],
)
def test_a_shard_name_that_is_no_plain_file_name_is_refused(tmp_path, write_index, craft, name):
    craft(tmp_path / "outside.safetensors", {"a": F32}, bytes(8))
    craft(tmp_path / "root/sub/x.safetensors", {"a": F32}, bytes(8))
    write_index(tmp_path / "root", {"weight_map": {"a": name}})
    refusal(tmp_path / "root")


@pytest.mark.parametrize(
    "index",
    [
        [],
        {},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": {"a": 1}},
        {"weight_map": {"a": None}},
    ],
)
def test_a_bad_index_is_refused(tmp_path, write_index, index):
    write_index(tmp_path, index)
    assert "model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 200_000, b'{"weight_map": 1e999'])
def test_an_index_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    assert "model.safetensors.index.json is not JSON" in refusal(tmp_path)


def test_a_link_out_of_the_directory_is_refused(tmp_path, craft):
    craft(tmp_path / "secret.safetensors", {"a": F32}, bytes(8))
    root = tmp_path / "root"
    root.mkdir()
    (root / "model.safetensors").symlink_to("../secret.safetensors")
    assert "leads out of the directory" in refusal(root)


def test_a_link_within_the_directory_is_followed(tmp_path, craft):
    craft(tmp_path / "real.safetensors", {"a": F32}, bytes(8))
    (tmp_path / "model.safetensors").symlink_to("real.safetensors")
    assert read_layout(tmp_path).tensors[0].name == "a"


def test_the_links_of_a_hub_cache_are_followed(tmp_path, craft):
    craft(tmp_path / "models--org--name/blobs/0123", {"a": F32}, bytes(8))
    revision = tmp_path / "models--org--name/snapshots/main"
    revision.mkdir(parents=True)
    (revision / "model.safetensors").symlink_to("../../blobs/0123")
    assert read_layout(revision).tensors[0].name == "a"


def test_a_pipe_in_place_of_a_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path)


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)


def test_pickled_weights_are_never_loaded(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message
    assert "safetensors" in message


def test_a_directory_without_weights_is_refused(tmp_path):
    assert "holds neither" in refusal(tmp_path)
