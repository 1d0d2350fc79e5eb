"""Which low-rank updates an adapter's files hold, and whether they fit a base model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.adapters.config import DEFAULT_MAX_RANK, LoraConfig, ends, read_config
from flashserve.store.checkpoint.files import CheckpointFiles, shown
from flashserve.store.checkpoint.layout import Layout, TensorEntry, read_layout
from flashserve.store.checkpoint.snapshot import Snapshot

MAX_LAYERS = 1 << 16
MAX_NAME_CHARACTERS = 512
DTYPES = ("F32", "F16", "BF16")

_PREFIX = "base_model.model."
_MODULE = re.compile(r"\w+(?:\.\w+)*", re.ASCII)
_SIDE = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?P<weight>\.weight)?"
)
_COPY = re.compile(
    r"(?P<module>(?:.+\.)?(?:embed_tokens|wte|embed_in|lm_head|embed_out))(?:\.base_layer)?\.weight"
)
_EMBEDDING = re.compile(r"(?:.*\.)?(?:embed_tokens|wte|embed_in|word_embeddings)")
_HEAD = re.compile(r"(?:.*\.)?(?:lm_head|embed_out)")
_KNOWN_VARIANTS = {
    "lora_magnitude_vector": "DoRA, which is not served",
    "modules_to_save": "a whole module, which is not served",
    "token_adapter": "trained tokens, which are not served",
    "lora_B.bias": "a bias, which is not served",
}


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterLayer:
    """The update of one module of the base; see messages.work.LoraLayer for the shapes."""

    module: str
    scaling: float
    is_embedding: bool
    a: TensorEntry
    b: TensorEntry

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Of the base's weight that it updates."""
        if self.is_embedding:
            return self.a.shape[1], self.b.shape[0]
        return self.b.shape[0], self.a.shape[1]


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterSnapshot:
    """An adapter as its source holds it. `snapshot` is what the store keeps of any checkpoint.

    copies are weights of the base that PEFT saved beside the updates, by the base's module: those
    of embeddings that are targets. They are not served, so they must be the base's own.
    """

    snapshot: Snapshot
    config: LoraConfig
    layers: tuple[AdapterLayer, ...]
    copies: tuple[tuple[str, TensorEntry], ...] = ()

    @property
    def uri(self) -> str:
        return self.snapshot.uri

    @property
    def identity(self) -> str:
        return self.snapshot.identity

    @property
    def directory(self) -> Path:
        return self.snapshot.directory

    @property
    def layout(self) -> Layout:
        return self.snapshot.layout

    @property
    def size_bytes(self) -> int:
        return self.snapshot.size_bytes

    @property
    def rank(self) -> int:
        """The largest of its layers'."""
        return max(layer.rank for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        shapes = (side.shape for layer in self.layers for side in (layer.a, layer.b))
        return sum(rows * columns for rows, columns in shapes)

    @property
    def targets(self) -> tuple[str, ...]:
        """The kinds of modules that it adapts, sorted."""
        return tuple(sorted({layer.module.rpartition(".")[2] for layer in self.layers}))


def read_adapter(
    files: CheckpointFiles, uri: str, identity: str, max_rank: int = DEFAULT_MAX_RANK
) -> AdapterSnapshot:
    """Reads and checks an adapter's configuration and the headers of its weights.

    Args:
        files: of the adapter.
        uri: as it was registered.
        identity: of the listing to which the files belong.
        max_rank: the largest that is served.

    Raises:
        SourceError: a file cannot be had.
        CheckpointError: a file is damaged or missing, or contradicts another; one line.
        UnsupportedModelError: it needs something that is not served exactly.
    """
    config = read_config(files, max_rank)
    layout = read_layout(files)
    try:
        layers, copies = _pair(layout, config)
    except _MisfitError as error:
        raise CheckpointError(f"{files.place} {error}") from None
    except _VariantError as error:
        raise UnsupportedModelError(f"{files.place} {error}") from None
    snapshot = Snapshot(
        uri=uri,
        identity=identity,
        directory=files.directory,
        config={},
        generation_config={},
        layout=layout,
        has_tokenizer=False,
        chat_template=None,
    )
    return AdapterSnapshot(snapshot, config, layers, copies)


def check_base(adapter: AdapterSnapshot, base: Layout, base_name: str) -> None:
    """Refuses an adapter that does not fit a base model.

    Raises:
        CheckpointError: it adapts modules that the base lacks or has in other shapes; names both.
    """
    weights = weights_by_module(base)
    trained_on = f" (it was trained on {shown(adapter.config.base_name)})"
    hint = trained_on if adapter.config.base_name else ""
    known = {end for module in weights for end in ends(module)}
    for name in sorted(adapter.config.target_names - known):
        if not _HEAD.fullmatch(name):  # that may be tied, and so not stored
            raise CheckpointError(
                f"{adapter.uri} has the target module {shown(name)}, which {base_name} does not "
                f"have{hint}"
            )
    for module, wanted in _needed_shapes(adapter):
        weight = base_weight(weights, module)
        if weight is None:
            raise CheckpointError(
                f"{adapter.uri} adapts {shown(module)}, which {base_name} does not have{hint}"
            )
        if weight.shape != wanted:
            raise CheckpointError(
                f"{adapter.uri} does not fit {base_name}: {module} has the shape "
                f"{_shape(weight.shape)} there and {_shape(wanted)} in the adapter{hint}"
            )


def weights_by_module(base: Layout) -> dict[str, TensorEntry]:
    """The matrices of a model by the name of their module."""
    return {
        tensor.name.removesuffix(".weight"): tensor
        for tensor in base.tensors
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2
    }


def base_weight(weights: Mapping[str, TensorEntry], module: str) -> TensorEntry | None:
    """Of a module; that of an output projection which is not stored is tied to the embedding."""
    found = weights.get(module)
    if found is None and _HEAD.fullmatch(module):
        embeddings = [weight for name, weight in weights.items() if _EMBEDDING.fullmatch(name)]
        return embeddings[0] if len(embeddings) == 1 else None
    return found


class _MisfitError(Exception):
    """What contradicts what; the message follows the adapter's place."""


class _VariantError(Exception):
    """What is not served; the message follows the adapter's place."""


def _pair(
    layout: Layout, config: LoraConfig
) -> tuple[tuple[AdapterLayer, ...], tuple[tuple[str, TensorEntry], ...]]:
    """The layers, by name of their module, and the copies."""
    sides: dict[tuple[str, bool], dict[str, TensorEntry]] = {}
    copies: list[tuple[str, TensorEntry]] = []
    for tensor in layout.tensors:
        match = _key(tensor.name)
        if "side" in match.groupdict():
            place = match["module"], match["embedding"] is not None
            sides.setdefault(place, {})[match["side"]] = tensor
        else:
            copies.append((match["module"], tensor))
    if not sides:
        raise _MisfitError("holds no LoRA weights")
    if len(sides) > MAX_LAYERS:
        raise _MisfitError(f"adapts {len(sides)} modules; at most {MAX_LAYERS} are read")
    layers = [_layer(*place, pair, config) for place, pair in sorted(sides.items())]
    return tuple(layers), tuple(copies)


def _key(name: str) -> re.Match[str]:
    """What a tensor of an adapter is, by its name."""
    for part, what in _KNOWN_VARIANTS.items():
        if part in name:
            raise _VariantError(f"holds {shown(name)}: {what}")
    rest = name.removeprefix(_PREFIX)[:MAX_NAME_CHARACTERS]
    match = _SIDE.fullmatch(rest) or _COPY.fullmatch(rest)
    is_ours = match is not None and name == _PREFIX + rest and _MODULE.fullmatch(match["module"])
    if match is None or not is_ours:
        raise _MisfitError(
            f"holds {shown(name)}, which is no name that PEFT gives to LoRA weights: save it with "
            "save_pretrained"
        )
    groups = match.groupdict()
    if "side" in groups and (groups["embedding"] is None) != (groups["weight"] is not None):
        raise _MisfitError(f"holds {shown(name)}, which is neither of a layer nor of an embedding")
    return match


def _layer(
    module: str, is_embedding: bool, pair: dict[str, TensorEntry], config: LoraConfig
) -> AdapterLayer:
    a, b = pair.get("A"), pair.get("B")
    if a is None or b is None:
        lacking, there = ("A", "B") if a is None else ("B", "A")
        raise _MisfitError(f"has lora_{there} of {module} but no lora_{lacking}")
    if not config.names(module):
        raise _MisfitError(f"has weights for {module}, which its target_modules do not name")
    if is_embedding != (_EMBEDDING.fullmatch(module) is not None):
        kind = "an embedding" if is_embedding else "a linear layer"
        raise _MisfitError(f"adapts {module} as {kind}, which it is not")
    for side in (a, b):
        if side.dtype not in DTYPES:
            raise _MisfitError(
                f"has {module} in {side.dtype}; LoRA weights are {', '.join(DTYPES)}"
            )
        if len(side.shape) != 2 or 0 in side.shape:
            raise _MisfitError(f"has a {_shape(side.shape)} tensor for {module}, not a matrix")
    rank = config.rank_of(module)
    if a.shape[0] != rank or b.shape[1] != rank:
        raise _MisfitError(
            f"has {_shape(a.shape)} and {_shape(b.shape)} for {module}, where its configuration "
            f"says rank {rank}"
        )
    return AdapterLayer(module, config.scaling_of(module), is_embedding, a, b)


def _needed_shapes(adapter: AdapterSnapshot) -> Iterable[tuple[str, tuple[int, ...]]]:
    for layer in adapter.layers:
        yield layer.module, layer.weight_shape
    for module, copy in adapter.copies:
        yield module, copy.shape


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"
