"""What a LoRA adapter says of itself: PEFT's adapter_config.json, read without believing it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any

import msgspec

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.adapters.patterns import check, first_match
from flashserve.store.checkpoint.files import CheckpointFiles, one_line, read_json, shown
from flashserve.store.checkpoint.naming import ADAPTER_CONFIG_NAME, is_adapter, is_model

MAX_CONFIG_BYTES = 1 << 20
DEFAULT_MAX_RANK = 128

_MAX_ALPHA = 1e6
_MAX_PATTERNS = 4096
_MAX_REAL_PATTERNS = 64
"""Of those that are more than a name: each costs time for every module."""

_ANY_LAYER = re.compile(r".*?\.[^.]*\.(\d{1,6})\.")
_PLAIN_NAME = re.compile(r"\w{1,64}", re.ASCII)
_OUTPUT_NAMES = ("lm_head", "embed_out")

_KEEPING_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Ways to begin a training that leave the base model's weights as they are."""
_REFUSED = {
    "use_dora": "DoRA is not served: merge it into its base and deploy that",
    "modules_to_save": "whole modules of its own are not served: merge it into its base and "
    "deploy that",
    "lora_bias": "biases are not served: train with lora_bias=False",
    "fan_in_fan_out": "transposed layers are not served",
    "target_parameters": "parameters that are no layer are not served",
    "trainable_token_indices": "trained tokens are not served: train embed_tokens as a target",
    "megatron_config": "Megatron's layers are not served",
    "layer_replication": "replicated layers are not served: deploy the grown model",
    "alora_invocation_tokens": "activated LoRA is not served",
    "ensure_weight_tying": "tied adapters are not served",
    "use_qalora": "QALoRA is not served",
    "use_bdlora": "BD-LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "kasa_config": "KaSA is not served",
    "monteclora_config": "MonteCLoRA is not served",
}

_Rank = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]
_Alpha = Annotated[float, msgspec.Meta(gt=-_MAX_ALPHA, lt=_MAX_ALPHA)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class _Raw(msgspec.Struct, frozen=True):
    """The fields that decide what is computed. PEFT's defaults stand for those that are absent."""

    peft_type: str
    r: _Rank = 8
    lora_alpha: _Alpha = 8.0
    use_rslora: bool | None = False
    rank_pattern: dict[_Name, _Rank] | None = None
    alpha_pattern: dict[_Name, _Alpha] | None = None
    target_modules: tuple[_Name, ...] | _Name | None = None
    exclude_modules: tuple[_Name, ...] | str | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: tuple[_Name, ...] | str | None = None
    base_model_name_or_path: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class LoraConfig:
    """How large an adapter's updates are, and to which modules it makes them.

    target_modules: names, or ends of names after a dot; a pattern, which is not evaluated, since
    the weights say which modules it meant; or "all-linear".
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: frozenset[str] | str
    exclude_modules: frozenset[str]
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...]
    base_name: str
    """What it was trained on, in the words of its trainer."""

    @property
    def target_names(self) -> frozenset[str]:
        """Its target modules, as far as they are listed by name."""
        targets = self.target_modules
        return frozenset() if isinstance(targets, str) else targets

    @property
    def max_rank(self) -> int:
        """The largest rank that it names."""
        return max(self.rank, *self.rank_pattern.values(), 1)

    def rank_of(self, module: str) -> int:
        key = first_match(self.rank_pattern, module)
        return self.rank if key is None else self.rank_pattern[key]

    def scaling_of(self, module: str) -> float:
        """What B A x is multiplied with; see Kalajdzievski, arXiv:2312.03732, for rsLoRA."""
        key = first_match(self.alpha_pattern, module)
        alpha = self.alpha if key is None else self.alpha_pattern[key]
        rank = self.rank_of(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def names(self, module: str) -> bool:
        """Whether its target modules say that it adapts a module of this name."""
        if not self.exclude_modules.isdisjoint(ends(module)):
            return False
        if isinstance(self.target_modules, str):
            is_all_linear = self.target_modules.lower() == "all-linear"
            return not (is_all_linear and module.endswith(_OUTPUT_NAMES))
        if module in self.target_modules:
            return True
        is_named = not self.target_modules.isdisjoint(ends(module))
        return is_named and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        matches = [_ANY_LAYER.match(module)]
        if self.layers_pattern:
            patterns = (rf"(?:.*?\.)??{name}\.(\d{{1,6}})\." for name in self.layers_pattern)
            matches = [re.match(pattern, module) for pattern in patterns]
        match = next(filter(None, matches), None)
        return match is not None and int(match[1]) in self.layers_to_transform


def read_config(files: CheckpointFiles, max_rank: int = DEFAULT_MAX_RANK) -> LoraConfig:
    """The adapter's configuration.

    Raises:
        CheckpointError: it is missing, or not what PEFT writes.
        UnsupportedModelError: it asks for something that is not served exactly; names the field.
        SourceError: it cannot be had.
    """
    names = files.names()
    if is_model(names) or ("config.json" in names and not is_adapter(names)):
        raise CheckpointError(
            f"{files.place} holds a model, not an adapter alone: flashserve deploy NAME SOURCE"
        )
    raw = read_json(files, ADAPTER_CONFIG_NAME, MAX_CONFIG_BYTES)
    if raw is None:
        raise CheckpointError(f"{files.place}/{ADAPTER_CONFIG_NAME} is missing")
    return parse_config(raw, f"{files.place}/{ADAPTER_CONFIG_NAME}", max_rank)


def parse_config(raw: dict[str, Any], path: str, max_rank: int = DEFAULT_MAX_RANK) -> LoraConfig:
    """Checks the object in an adapter_config.json; `path` names it in messages.

    Raises:
        CheckpointError, UnsupportedModelError: as for `read_config`.
    """
    if raw.get("peft_type", "LORA") != "LORA":
        raise UnsupportedModelError(
            f"{path} has peft_type {shown(raw['peft_type'])}; only LORA is served"
        )
    _refuse_variants(raw, path)
    try:
        fields = msgspec.convert(raw, _Raw)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path} cannot be used: {one_line(error)}") from None
    config = _config(fields)
    _check_patterns(config, path)
    if not config.target_modules:
        raise CheckpointError(f"{path} names no target_modules")
    for name in config.layers_pattern:
        if not _PLAIN_NAME.fullmatch(name):
            raise UnsupportedModelError(
                f"{path} has layers_pattern {shown(name)}; only a plain name is taken"
            )
    if config.max_rank > max_rank:
        raise UnsupportedModelError(
            f"{path} has rank {config.max_rank}; at most {max_rank} is served: raise "
            "engine.max_lora_rank"
        )
    return config


def ends(module: str) -> Iterator[str]:
    """A module's name, and what is left of it after each dot."""
    while module:
        yield module
        module = module.partition(".")[2]


def _refuse_variants(raw: dict[str, Any], path: str) -> None:
    unknown = {name for name in raw if name.startswith("use_") and name != "use_rslora"}
    for name in [*_REFUSED, *sorted(unknown - _REFUSED.keys())]:
        if raw.get(name):
            why = _REFUSED.get(name, "that kind of LoRA is not known here")
            raise UnsupportedModelError(f"{path} sets {shown(name)}: {why}")
    if raw.get("bias") not in (None, "none"):
        raise UnsupportedModelError(
            f"{path} has bias {shown(raw['bias'])}: biases are not served: train with bias='none'"
        )
    if (init := raw.get("init_lora_weights")) not in _KEEPING_INITS:
        raise UnsupportedModelError(
            f"{path} has init_lora_weights {shown(init)}, which changes the base's weights: save "
            "it with path_initial_model_for_weight_conversion"
        )


def _config(fields: _Raw) -> LoraConfig:
    layers = fields.layers_to_transform
    if isinstance(layers, int):
        layers = (layers,)
    excluded, targets = fields.exclude_modules, fields.target_modules
    return LoraConfig(
        rank=fields.r,
        alpha=fields.lora_alpha,
        use_rslora=bool(fields.use_rslora),
        rank_pattern=fields.rank_pattern or {},
        alpha_pattern=fields.alpha_pattern or {},
        target_modules=targets if isinstance(targets, str) else frozenset(targets or ()),
        # A pattern is not evaluated: the weights say which modules it left out.
        exclude_modules=frozenset(excluded if isinstance(excluded, tuple) else ()),
        layers_to_transform=frozenset(layers) if layers else None,
        layers_pattern=_names(fields.layers_pattern),
        base_name=fields.base_model_name_or_path or "",
    )


def _names(value: tuple[str, ...] | str | None) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,) if value else ()
    return value or ()


def _check_patterns(config: LoraConfig, path: str) -> None:
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, Any] = getattr(config, field)
        num_real = sum(not re.fullmatch(r"(?:\w|\\?\.)+", key, re.ASCII) for key in patterns)
        if len(patterns) > _MAX_PATTERNS or num_real > _MAX_REAL_PATTERNS:
            raise UnsupportedModelError(
                f"{path} has a {field} of {len(patterns)} entries, {num_real} of them with "
                f"operators; at most {_MAX_PATTERNS} and {_MAX_REAL_PATTERNS} are taken"
            )
        for pattern, reason in check(patterns):
            raise UnsupportedModelError(f"{path} has {field} {shown(pattern)}, which {reason}")
