"""Which modules of a model an adapter can change, and the pages that a row of each takes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, TypeAlias

from torch import nn

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.messages.work import AdapterImage, LoraLayer

_LEAST_PAGE = 64
_MOST_PAGE = 1024
_DTYPES = {"F32", "F16", "BF16"}


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """A linear layer that the decoder layers have in common, or one module outside of them.

    name is what follows `model.layers.N.`, or the whole name of a module outside.
    """

    name: str
    in_features: int
    out_features: int
    is_outside: bool = False


Group: TypeAlias = tuple[Target, ...]
"""Linear layers that share their input and are computed one after another."""


class Targets:
    """The adaptable modules of one model.

    Args:
        model: a causal language model of transformers. The routed experts of a mixture are left
            out: PEFT adapts them in another way.
    """

    def __init__(self, model: Any) -> None:
        self.num_layers = len(model.model.layers)
        self._places: dict[str, tuple[int, Target]] = {}
        self.embedding = self._outside(model, model.get_input_embeddings())
        self.head = self._outside(model, model.get_output_embeddings())
        for index, layer in enumerate(model.model.layers):
            for name, module in layer.named_modules():
                if isinstance(module, nn.Linear) and ".experts." not in name:
                    target = Target(name, module.in_features, module.out_features)
                    self._places[f"model.layers.{index}.{name}"] = (index, target)
        self.page_elements = _page_elements(
            size
            for _, target in self._places.values()
            if not target.is_outside
            for size in (target.in_features, target.out_features)
        )

    def place(self, module: str) -> tuple[int, Target] | None:
        """Layer and target of a module's full name; the layer of one outside counts for nothing."""
        return self._places.get(module)

    def linears(self) -> Iterable[tuple[str, int, Target]]:
        """Name, layer and target of every linear layer inside the decoder layers."""
        for name, (layer, target) in self._places.items():
            if not target.is_outside:
                yield name, layer, target

    def width(self, target: Target, num_elements: int) -> int:
        """Pages of a row; one of a module outside is spread over all layers' memory."""
        spread = self.num_layers if target.is_outside else 1
        return -(-num_elements // (self.page_elements * spread))

    def check(self, image: AdapterImage) -> None:
        """Raises:
        UnsupportedModelError: a layer belongs to no module that can be adapted.
        CheckpointError: its shapes are not those of the module.
        """
        for layer in image.layers:
            place = self.place(layer.module)
            if place is None:
                raise UnsupportedModelError(
                    f"adapter {image.adapter_id}: {layer.module} is no module of the base model "
                    "that an adapter can change"
                )
            _check_shapes(image, layer, place[1])

    def _outside(self, model: Any, module: nn.Module) -> Target:
        name = next(name for name, found in model.named_modules() if found is module)
        if isinstance(module, nn.Embedding):
            target = Target(name, module.num_embeddings, module.embedding_dim, is_outside=True)
        else:
            linear: Any = module
            target = Target(name, linear.in_features, linear.out_features, is_outside=True)
        self._places[name] = (0, target)
        return target


def _check_shapes(image: AdapterImage, layer: LoraLayer, target: Target) -> None:
    if not {layer.a.dtype, layer.b.dtype} <= _DTYPES:
        raise UnsupportedModelError(
            f"adapter {image.adapter_id}: {layer.module} has weights of type {layer.a.dtype} and "
            f"{layer.b.dtype}; F32, F16 and BF16 are supported"
        )
    rank = layer.a.shape[0] if layer.a.shape else 0
    wanted = ((rank, target.in_features), (target.out_features, rank))
    found = (tuple(layer.a.shape), tuple(layer.b.shape))
    if rank < 1 or found != wanted:
        raise CheckpointError(
            f"adapter {image.adapter_id}: A and B of {layer.module} are {list(found[0])} and "
            f"{list(found[1])}, which its base, {target.in_features} to {target.out_features}, "
            "does not take"
        )


def _page_elements(sizes: Iterable[int]) -> int:
    """What all sizes are multiples of, where that is no tiny number; else padding is taken."""
    common = math.gcd(*sizes)
    if common < _LEAST_PAGE:
        return _LEAST_PAGE
    divisor = next(number for number in range(_MOST_PAGE, 0, -1) if common % number == 0)
    return max(divisor, _LEAST_PAGE)
