import random

import pytest

from flashserve.store.checkpoint import order
from flashserve.store.checkpoint.layout import FileEntry, Layout, TensorEntry
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.checkpoint.order import ChunkPlace, chunk_order, groups

LLAMA = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    *(f"model.layers.{n}.{part}.weight" for n in range(12) for part in ("mlp.up", "self_attn.q")),
    "model.norm.weight",
]


def test_a_llama_goes_embedding_layers_by_number_norm_and_head():
    found = groups(LLAMA)
    assert len(found) == 14
    assert found[0] == ("model.embed_tokens.weight",)
    assert found[1 + 10] == ("model.layers.10.mlp.up.weight", "model.layers.10.self_attn.q.weight")
    assert found[-1] == ("lm_head.weight", "model.norm.weight")


def test_the_order_of_the_names_does_not_matter():
    shuffled = random.Random(0).sample(LLAMA, len(LLAMA))
    assert groups(shuffled) == groups(LLAMA)


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["wte.weight", "h.0.ln.weight", "ln_f.weight"], (1, 1, 1)),
        (["transformer.wte.weight", "transformer.h.0.a", "transformer.ln_f.bias"], (1, 1, 1)),
        (
            ["backbone.embeddings.weight", "backbone.layers.0.a", "backbone.norm_f.weight"],
            (1, 1, 1),
        ),
        (["embed.weight", "blocks.3.a", "blocks.7.a", "norm.weight"], (1, 1, 1, 1)),
        (["model.embed_tokens.weight", "model.layers.0.mlp.experts.7.w1"], (1, 1, 0)),
        (["weight"], (1, 0)),
        ([], (0, 0)),
    ],
)
def test_families_name_their_parts_differently(names, wanted):
    assert tuple(map(len, groups(names))) == wanted


def test_what_is_unknown_comes_first():
    extra = ["model.per_layer_projection.weight", "model.layers_scale", "other.norm.weight"]
    assert set(groups(LLAMA + extra)[0]) == {"model.embed_tokens.weight", *extra}


def test_a_vision_tower_is_needed_before_the_first_layer_of_the_decoder():
    tower = [f"vision.encoder.layers.{n}.w" for n in range(20)]
    found = groups(LLAMA + tower)
    assert len(found) == 14
    assert set(found[0]) == {"model.embed_tokens.weight", *tower}


def test_an_embedding_that_is_stored_as_the_projection_comes_first():
    found = groups(["lm_head.weight", "model.layers.0.w", "model.norm.weight"])
    assert found == (("lm_head.weight",), ("model.layers.0.w",), ("model.norm.weight",))


@pytest.fixture
def tens(monkeypatch):
    monkeypatch.setattr(order, "CHUNK_BYTES", 10)


def test_a_chunk_belongs_to_the_first_group_that_needs_a_byte_of_it(tens):
    """Two files as savers write them: by name, so that layer 10 precedes layer 2."""
    tensors = (
        TensorEntry("lm_head.weight", "U8", (9,), 0, 3, 12),
        TensorEntry("model.embed_tokens.weight", "U8", (8,), 0, 12, 20),
        TensorEntry("model.layers.10.w", "U8", (10,), 0, 20, 30),
        TensorEntry("model.layers.2.w", "U8", (15,), 0, 30, 45),
        TensorEntry("model.norm.weight", "U8", (4,), 1, 21, 25),
    )
    layout = Layout((FileEntry("a", 45), FileEntry("b", 25)), tensors)
    assert chunk_order(layout) == (
        ChunkPlace(0, 1, 0),
        ChunkPlace(0, 3, 1),
        ChunkPlace(0, 4, 1),
        ChunkPlace(0, 2, 2),
        ChunkPlace(0, 0, 3),
        ChunkPlace(1, 0, 3),
        ChunkPlace(1, 1, 3),
        ChunkPlace(1, 2, 3),
    )


def test_every_chunk_comes_once_and_before_its_group_may_open():
    size = 9 * CHUNK_BYTES + 5
    step = size // len(LLAMA)
    tensors = tuple(
        TensorEntry(name, "U8", (step,), index % 2, begin * step, (begin + 1) * step)
        for index, name in enumerate(sorted(LLAMA))
        for begin in [index // 2]
    )
    layout = Layout((FileEntry("a", size), FileEntry("b", size)), tensors)
    places = chunk_order(layout)
    assert {(place.file_index, place.index) for place in places} == {
        (file, index) for file in (0, 1) for index in range(10)
    }
    assert len(places) == 20
    assert [place.group for place in places] == sorted(place.group for place in places)
    named = groups(LLAMA)
    first_needs = {(place.file_index, place.index): place.group for place in places}
    for group, names in enumerate(named):
        for tensor in (each for each in tensors if each.name in names):
            for index in range(tensor.begin // CHUNK_BYTES, -(-tensor.end // CHUNK_BYTES)):
                assert first_needs[tensor.file_index, index] <= group


def test_an_empty_tensor_needs_no_chunk(tens):
    layout = Layout((FileEntry("a", 20),), (TensorEntry("model.embed.w", "U8", (0,), 0, 20, 20),))
    assert [place.group for place in chunk_order(layout)] == [1, 1]
