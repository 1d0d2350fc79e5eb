"""Hub sources against a small fake hub. huggingface_hub reads its environment when it is imported,
so each case runs in a process of its own, as a user's would.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.numpy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PROGRAM = """
import json, sys
from pathlib import Path
from flashserve.config import StoreSettings
from flashserve.errors import DeployError
from flashserve.store.sources.listed import ListedFiles
from flashserve.store.checkpoint.layout import read_layout
from flashserve.store.sources.source import open_source

source = open_source(sys.argv[1], Path(), StoreSettings(remote_retries=1))
try:
    listing = source.listing()
    layout = read_layout(ListedFiles(source, listing, Path()))
    contents = {}
    for file in listing.files:
        reader = source.open(file)
        target = bytearray(file.num_bytes)
        reader.read(0, memoryview(target))
        reader.close()
        contents[file.name] = target.hex()
    print(json.dumps({
        "identity": listing.identity,
        "files": {file.name: [file.identity, dict(file.digests)] for file in listing.files},
        "contents": contents,
        "tensors": len(layout.tensors),
        "tier": source.lowest_tier.label,
        "torch": "torch" in sys.modules,
    }))
except DeployError as error:
    print(json.dumps({"error": error.message, "code": error.code}))
"""


class FakeHub:
    """One repository, org/model, whose large file is behind a redirect to another server."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.commit = COMMIT
        self.status = 200
        self.extra: list[dict[str, object]] = []
        self.token: str | None = None
        self.seen: list[tuple[str, str, str | None]] = []
        self.cdn = _serve(self._answer_cdn)
        self.hub = _serve(self._answer_hub)
        self.url = f"http://127.0.0.1:{self.hub.server_port}"

    def close(self) -> None:
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def _answer_hub(self, request: BaseHTTPRequestHandler) -> None:
        self.seen.append(("hub", request.path, request.headers.get("Authorization")))
        path = request.path.partition("?")[0]
        if self.status != 200:
            _send(request, self.status, b"{}")
        elif self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            _send(request, 401, b"{}", X_Error_Code="RepoNotFound")
        elif path in {f"/api/models/org/model/revision/{name}" for name in ("main", self.commit)}:
            _send(request, 200, json.dumps(self._info()).encode())
        elif path.startswith("/api/models/org/model/revision/"):
            _send(request, 404, b"{}", X_Error_Code="RevisionNotFound")
        elif path.startswith("/api/"):
            _send(request, 404, b"{}", X_Error_Code="RepoNotFound")
        elif path == f"/org/model/resolve/{self.commit}/model.safetensors":
            location = f"http://127.0.0.1:{self.cdn.server_port}/blob?signature=s"
            _send(request, 302, b"moved", Location=location)
        else:
            _send_range(
                request, self.files[path.removeprefix(f"/org/model/resolve/{self.commit}/")]
            )

    def _answer_cdn(self, request: BaseHTTPRequestHandler) -> None:
        self.seen.append(("cdn", request.path, request.headers.get("Authorization")))
        _send_range(request, self.files["model.safetensors"])

    def _info(self) -> dict[str, object]:
        siblings: list[dict[str, object]] = []
        for name, data in self.files.items():
            entry: dict[str, object] = {"rfilename": name, "size": len(data), "blobId": "b" * 40}
            if name.endswith(".safetensors"):
                sha256 = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
            siblings.append(entry)
        return {"id": "org/model", "sha": self.commit, "siblings": siblings + self.extra}


def _serve(answer) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    return server


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _send_range(request: BaseHTTPRequestHandler, data: bytes) -> None:
    first, last = map(int, request.headers["Range"].removeprefix("bytes=").split("-"))
    piece = data[first : last + 1]
    _send(request, 206, piece, Content_Range=f"bytes {first}-{last}/{len(data)}")


@pytest.fixture
def hub():
    weights = {"weight": np.arange(50_000, dtype=np.float32)}
    hub = FakeHub(
        {
            "config.json": b'{"model_type": "llama"}',
            "model.safetensors": safetensors.numpy.save(weights),
            "tokenizer.json": b"{}",
            "README.md": b"not ours",
            "onnx/model.json": b"not ours",
        }
    )
    yield hub
    hub.close()


@pytest.fixture
def ask(hub, tmp_path):
    def run(uri="hf://org/model", **environment):
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGG"))
        }
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}
        done = subprocess.run(
            [sys.executable, "-W", "error::ResourceWarning", "-c", PROGRAM, uri],
            env={**kept, **home, **environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "ResourceWarning" not in done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def cached(hub, tmp_path):
    """The hub's cache, as huggingface_hub lays it out, with the whole repository in it."""
    repo = tmp_path / "home/hub/models--org--model"
    snapshot = repo / "snapshots" / COMMIT
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    snapshot.mkdir(parents=True)
    (repo / "refs/main").write_text(COMMIT)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (repo / "blobs" / f"blob-{name}").write_bytes(hub.files[name])
        (snapshot / name).symlink_to(f"../../blobs/blob-{name}")
    return snapshot


def wanted(hub):
    names = ("config.json", "model.safetensors", "tokenizer.json")
    return {name: hub.files[name].hex() for name in names}


def test_a_repository_is_listed_and_read_as_it_is(hub, ask):
    found = ask()
    assert found["contents"] == wanted(hub)
    assert found["tensors"] == 1
    assert not found["torch"]
    assert found["tier"] == "remote"
    identity, digests = found["files"]["model.safetensors"]
    sha256 = hashlib.sha256(hub.files["model.safetensors"]).hexdigest()
    assert digests == {"sha256": sha256}
    assert sha256 in identity
    assert COMMIT in found["identity"]
    assert COMMIT in found["files"]["config.json"][0]


@pytest.fixture
def adapter(hub):
    """The repository holds an adapter, and a tokenizer beside it."""
    weights = {"base_model.model.q_proj.lora_A.weight": np.zeros((4, 8), np.float32)}
    hub.files = {
        "adapter_config.json": b'{"peft_type": "LORA"}',
        "adapter_model.safetensors": safetensors.numpy.save(weights),
        "tokenizer.json": b"{}",
    }
    return {name: data.hex() for name, data in hub.files.items() if name.startswith("adapter")}


def test_an_adapters_repository_is_read_without_its_bases_tokenizer(adapter, ask):
    found = ask()
    assert found["contents"] == adapter
    assert found["tier"] == "remote"


def test_an_adapter_in_the_hubs_cache_is_read_there(hub, adapter, ask, tmp_path):
    snapshot = tmp_path / "home/hub/models--org--model/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs/main").write_text(COMMIT)
    for name in adapter:
        (snapshot / name).write_bytes(hub.files[name])
    found = ask(HF_HUB_OFFLINE="1")
    assert found["contents"] == adapter
    assert found["tier"] == "disk"


def test_a_commit_is_a_revision(hub, ask):
    assert ask(f"hf://org/model@{COMMIT}")["contents"] == wanted(hub)


def test_the_token_goes_to_the_hub_alone(hub, ask):
    hub.token = "hf_secret"
    assert ask(HF_TOKEN="hf_secret")["contents"] == wanted(hub)
    asked = [(path, token) for place, path, token in hub.seen if "org/model" in path]
    assert [path for path, token in asked if token != "Bearer hf_secret"] == []
    assert {token for place, _, token in hub.seen if place == "cdn"} == {None}


def test_the_weights_of_another_commit_are_known_to_be_the_same(hub, ask):
    before = ask()
    hub.commit = "f" * 40
    hub.files["config.json"] = b'{"model_type": "other"}'
    after = ask()
    assert after["identity"] != before["identity"]
    assert after["files"]["config.json"] != before["files"]["config.json"]
    assert after["files"]["model.safetensors"] == before["files"]["model.safetensors"]


def test_what_is_in_the_hubs_cache_is_read_there(hub, ask, cached):
    found = ask()
    assert found["contents"] == wanted(hub)
    assert found["identity"].startswith(f"{cached}#")
    assert found["tier"] == "disk"
    assert [path for _, path, _ in hub.seen if "resolve" in path or "blob?" in path] == []


def test_a_partial_cache_is_not_taken_for_the_whole(hub, ask, cached):
    (cached / "tokenizer.json").unlink()
    assert ask()["contents"] == wanted(hub)
    assert any(place == "cdn" for place, _, _ in hub.seen)


@pytest.mark.parametrize("revision", ["", "@main", f"@{COMMIT}"])
def test_offline_the_cache_serves(hub, ask, cached, revision):
    found = ask(f"hf://org/model{revision}", HF_HUB_OFFLINE="1")
    assert found["contents"] == wanted(hub)
    assert hub.seen == []


def test_offline_and_absent_is_one_line(ask):
    found = ask(HF_HUB_OFFLINE="1")
    assert found["code"] == "bad_source"
    assert found["error"] == (
        "hf://org/model is not in the hub's cache on this machine, and HF_HUB_OFFLINE is set"
    )


def test_a_hub_that_is_down_is_replaced_by_the_cache(hub, ask, cached):
    hub.status = 503
    assert ask()["contents"] == wanted(hub)
    assert ask(HF_ENDPOINT="http://127.0.0.1:1")["contents"] == wanted(hub)


@pytest.mark.parametrize(
    ("uri", "status", "reason"),
    [
        ("hf://org/nothing", 200, "hf://org/nothing does not exist on the hub"),
        ("hf://org/model@v9", 200, "hf://org/model has no revision 'v9'"),
        ("hf://org/model", 503, "the hub answers 503"),
        ("hf://org/model", 400, "the hub answers 400"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub, ask, uri, status, reason):
    hub.status = status
    found = ask(uri)
    assert found["code"] == ("source_unavailable" if status == 503 else "bad_source")
    assert reason in found["error"]
    assert "\n" not in found["error"]


def test_a_hub_that_cannot_be_reached_is_one_line(ask):
    error = ask(HF_ENDPOINT="http://127.0.0.1:1")["error"]
    assert "the hub cannot be reached" in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("name", "reason"),
    [("../config.json", "leads out"), ("a\\b.json", "no name"), ("a\nb.json", "no name")],
)
def test_a_hostile_file_name_is_refused(hub, ask, name, reason):
    hub.extra = [{"rfilename": name, "size": 2, "blobId": "b" * 40}]
    found = ask()
    assert reason in found["error"]
    assert "\n" not in found["error"]


def test_a_small_file_that_is_huge_is_refused_unread(hub, ask):
    hub.extra = [{"rfilename": "huge.json", "size": 65 << 20, "blobId": "b" * 40}]
    assert "huge.json has 68157440 bytes" in ask()["error"]
