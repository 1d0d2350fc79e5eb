"""The order in which a forward pass needs a checkpoint's bytes: embedding, layers, head.

The store reads in this order and a worker computes in it; both call the same functions.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterable

from flashserve.store.checkpoint.layout import Layout
from flashserve.store.checkpoint.listing import CHUNK_BYTES

_LAYER = re.compile(r"(?P<parent>(?:.*?\.)??)(?:layers|h|blocks)\.(?P<number>\d{1,6})\.")
_EMBEDDING = re.compile(r"embed|wte")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)\.")
_FINAL_NORMS = ("norm.", "norm_f.", "ln_f.", "final_layernorm.", "final_layer_norm.", "final_norm.")


@dataclasses.dataclass(frozen=True, slots=True)
class ChunkPlace:
    """Chunk `index` of the file `file_index`, and the first group that needs it."""

    file_index: int
    index: int
    group: int


def groups(names: Iterable[str]) -> tuple[tuple[str, ...], ...]:
    """Tensor names by when a forward pass needs them; a group never needs a later one.

    Group 0 is the embedding and everything unknown. Then comes one group for each decoder layer, in
    their order, and at last the final norm and the output projection. The first and the last
    group are always there, empty or not. Where a model has several stacks of layers, the decoder is
    the one with the most tensors, and the others (a vision tower) belong to group 0.
    """
    names = sorted(set(names))
    matches = {name: match for name in names if (match := _LAYER.match(name))}
    stacks = collections.Counter(match["parent"] for match in matches.values())
    decoder = max(sorted(stacks), key=stacks.__getitem__, default=None)
    layers: dict[int, list[str]] = collections.defaultdict(list)
    first: list[str] = []
    last: list[str] = []
    for name in names:
        match = matches.get(name)
        if match and match["parent"] == decoder:
            layers[int(match["number"])].append(name)
        elif _is_last(name, decoder):
            last.append(name)
        else:
            first.append(name)
    if not any(_EMBEDDING.search(name) for name in first):
        # Tied, and stored under the name of the projection: the embedding is in there.
        heads = [name for name in last if _HEAD.match(name)]
        first, last = [*first, *heads], [name for name in last if name not in heads]
    return tuple(map(tuple, (first, *(layers[number] for number in sorted(layers)), last)))


def chunk_order(layout: Layout) -> tuple[ChunkPlace, ...]:
    """Every chunk of a checkpoint once, those of the first group first; in a group as in the files.

    Group g can be computed when all chunks of the groups up to g are there. Chunks without a byte
    of any tensor belong to the last group.
    """
    named = groups(tensor.name for tensor in layout.tensors)
    group_of = {name: group for group, names in enumerate(named) for name in names}
    first_needs = [[len(named) - 1] * _num_chunks(file.num_bytes) for file in layout.files]
    for tensor in layout.tensors:
        needs = first_needs[tensor.file_index]
        group = group_of[tensor.name]
        for index in range(tensor.begin // CHUNK_BYTES, _num_chunks(tensor.end)):
            needs[index] = min(needs[index], group)
    places = [
        ChunkPlace(file_index, index, group)
        for file_index, needs in enumerate(first_needs)
        for index, group in enumerate(needs)
    ]
    return tuple(sorted(places, key=lambda place: (place.group, place.file_index, place.index)))


def _is_last(name: str, decoder: str | None) -> bool:
    if _HEAD.match(name):
        return True
    return decoder is not None and name.startswith(tuple(decoder + norm for norm in _FINAL_NORMS))


def _num_chunks(num_bytes: int) -> int:
    return -(-num_bytes // CHUNK_BYTES)
