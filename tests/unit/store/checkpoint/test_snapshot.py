import json

import pytest

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.checkpoint import files
from flashserve.store.checkpoint.files import DirectoryFiles
from flashserve.store.checkpoint.snapshot import Snapshot, read_snapshot
from flashserve.store.dram.arena import EXTENT_ALIGNMENT
from flashserve.store.sources.source import open_source


def snapshot_of(directory) -> Snapshot:
    identity = open_source(str(directory), directory).listing().identity
    return read_snapshot(DirectoryFiles(directory), str(directory), identity)


def test_a_plain_checkpoint_is_read(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path, config={"model_type": "llama", "limits": [1]})
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 2}')
    found = snapshot_of(tmp_path)
    assert found.config == {"model_type": "llama", "limits": [1]}
    assert found.generation_config == {"eos_token_id": 2}
    assert found.size_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert found.arena_bytes == EXTENT_ALIGNMENT
    assert found.identity == open_source(str(tmp_path), tmp_path).listing().identity
    assert not found.has_tokenizer
    assert found.chat_template is None


def test_a_tokenizer_is_noticed(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert snapshot_of(tmp_path).has_tokenizer


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", "{{ messages }}"),
        ([{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}], "d"),
        ([{"name": "tool_use", "template": "t"}], None),
        ([{"name": ["unhashable"], "template": "t"}, 3], None),
        (3, None),
        (None, None),
    ],
)
def test_a_chat_template_is_taken_from_the_tokenizer(
    tmp_path, write_checkpoint, template, expected
):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert snapshot_of(tmp_path).chat_template == expected


def test_a_template_file_goes_first(tmp_path, write_checkpoint):
    write_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    (tmp_path / "chat_template.jinja").write_text("new")
    assert snapshot_of(tmp_path).chat_template == "new"


@pytest.mark.parametrize("data", [b"\xff\xfe", b"x" * (2 << 20)])
def test_a_bad_template_file_is_refused(tmp_path, write_checkpoint, data):
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        snapshot_of(tmp_path)


def test_a_missing_config_is_refused(tmp_path, write_checkpoint):
    (write_checkpoint(tmp_path) / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        snapshot_of(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "data", [b"", b"[]", b"3", b"null", b"{", b"\xff", b"[" * 200_000, b'{"a": "\\ud800"}']
)
def test_json_that_is_no_object_is_refused(tmp_path, write_checkpoint, name, data):
    (write_checkpoint(tmp_path) / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=name) as caught:
        snapshot_of(tmp_path)
    assert "\n" not in caught.value.message


def test_absurdly_large_json_is_refused_unread(tmp_path, write_checkpoint):
    path = write_checkpoint(tmp_path) / "config.json"
    with path.open("r+b") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=f"at most {files.MAX_JSON_BYTES}"):
        snapshot_of(tmp_path)


def test_a_config_that_leads_elsewhere_is_refused(tmp_path, write_checkpoint):
    root = write_checkpoint(tmp_path / "root")
    (root / "config.json").rename(tmp_path / "config.json")
    (root / "config.json").symlink_to("../config.json")
    with pytest.raises(CheckpointError, match="leads out of the directory"):
        snapshot_of(root)


def test_code_of_the_checkpoint_is_refused(tmp_path, write_checkpoint):
    config = {"model_type": "x", "auto_map": {"AutoModelForCausalLM": "modeling_x.X"}}
    write_checkpoint(tmp_path, config=config)
    with pytest.raises(UnsupportedModelError, match="auto_map"):
        snapshot_of(tmp_path)
