"""How a packed step goes through a model: by transformers' own code, or by a leaner path.

With small batches on a CPU a third of a step goes into calling modules and small operators, not
into the weights. `FusedForward` therefore runs the decoders of the Llama kind (norm, rotary
attention, norm, gated MLP) with the same weights and the same mathematics in fewer calls. All
else, such as Gemma's extra norms and soft-capping, goes through `ModuleForward`.

Both can begin before all weights are there: given `Gates`, they wait at each part for its own, and
drop the gates for good once all are open.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from flashserve.engine.attention import AttentionStep, attend, write
from flashserve.engine.gates import EMBEDDING, Gates, layer_group
from flashserve.engine.lora.batch import LoraStep
from flashserve.engine.lora.targets import Group, Target, Targets


class Forward(Protocol):
    """Computes the logits of some rows of a packed step."""

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        step: AttentionStep,
        lora: LoraStep | None = None,
    ) -> torch.Tensor:
        """Args: ids, positions: [T]; rows: [R] of them. Returns: [R, vocabulary].

        lora: what adapters add; `adapt` was called before the first one.
        """

    def adapt(self, targets: Targets) -> Sequence[Group]:
        """Prepares for updates by adapters; the groups of layers that LoraStep.add is called for.

        Once.
        """

    def close(self) -> None:
        """Takes off the model what was put on it."""


class ModuleForward:
    """The model as transformers wrote it."""

    def __init__(self, model: Any, gates: Gates | None = None) -> None:
        self._model = model
        self._gates = gates
        self._hooks = _hang(model, gates) if gates is not None else []
        self._lora: LoraStep | None = None
        self._lora_hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        step: AttentionStep,
        lora: LoraStep | None = None,
    ) -> torch.Tensor:
        self._lora = lora
        try:
            output = self._model(
                input_ids=ids[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=rows,
                flashserve_step=step,
            )
        finally:
            self._lora = None
        if self._gates is not None and self._gates.is_open:
            self._drop_gates()
        logits: torch.Tensor = output.logits[0]
        return logits

    def adapt(self, targets: Targets) -> Sequence[Group]:
        """Each layer is a group of its own."""
        groups: dict[Target, int] = {}
        for name, layer, target in targets.linears():
            index = groups.setdefault(target, len(groups))
            self._hang_update(name, functools.partial(self._update, layer, index))
        scale = float(getattr(self._model.get_input_embeddings(), "embed_scale", 1.0))
        self._hang_update(targets.embedding.name, functools.partial(self._update_embedding, scale))
        self._hang_update(targets.head.name, self._update_head)
        return [(target,) for target in groups]

    def close(self) -> None:
        self._drop_gates()
        while self._lora_hooks:
            self._lora_hooks.pop().remove()

    def _drop_gates(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._gates = None

    def _hang_update(self, name: str, update: Callable[[Any, Any], None]) -> None:
        def hook(_module: nn.Module, args: Any, output: Any) -> None:
            update(args[0][0], output[0])

        module = self._model.get_submodule(name)
        self._lora_hooks.append(module.register_forward_hook(hook))

    def _update(self, layer: int, group: int, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._lora is not None:
            self._lora.add(layer, group, x, out)

    def _update_embedding(self, scale: float, ids: torch.Tensor, hidden: torch.Tensor) -> None:
        if self._lora is not None:
            self._lora.add_embedding(ids, hidden, scale)

    def _update_head(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        if self._lora is not None:
            self._lora.add_head(hidden, logits)


def _hang(model: Any, gates: Gates) -> list[torch.utils.hooks.RemovableHandle]:
    """Hooks that wait before each part of the model that has weights."""
    last = gates.num_groups - 1
    parts = [(model.get_input_embeddings(), EMBEDDING), (model.model.norm, last)]
    parts += [(layer, layer_group(index)) for index, layer in enumerate(model.model.layers)]
    parts.append((model.get_output_embeddings(), last))

    def waiting_for(group: int) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _args: gates.wait(group)

    return [part.register_forward_pre_hook(waiting_for(group)) for part, group in parts]


@dataclasses.dataclass(frozen=True, slots=True)
class _Layer:
    """The parts of a decoder layer, weights transposed as torch.mm wants them."""

    index: int
    input_norm: torch.Tensor
    qkv: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    qk_norm: torch.Tensor | None
    """[heads + kv_heads, head_dim]; Qwen3 normalises queries and keys."""
    output: torch.Tensor
    mlp_norm: torch.Tensor
    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    window: int | None


class _ArrivingLayers:
    """The layers in order, each as soon as its weights are there.

    A layer is made only then, since some of what it holds is computed from weights.
    """

    def __init__(self, makers: list[Callable[[], _Layer]], gates: Gates | None) -> None:
        self._makers = makers
        self._gates = gates
        self._made: list[_Layer] = []

    def __iter__(self) -> Iterator[_Layer]:
        for index, make in enumerate(self._makers):
            if self._gates is not None:
                self._gates.wait(layer_group(index))
            if index == len(self._made):
                self._made.append(make())
            yield self._made[index]


# The groups of layers that FusedForward asks updates of adapters for, in this order.
_QKV, _OUTPUT, _GATE_UP, _DOWN = range(4)
_FUSED_GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)


class FusedForward:
    """Decoders of the Llama kind: Llama, Mistral, Qwen2 and Qwen3.

    Differs from transformers only in how intermediate values are rounded: sums are kept in
    float32 where transformers goes through bfloat16.
    """

    _ARCHITECTURES = frozenset(
        {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
    )

    def __init__(self, model: Any, gates: Gates | None = None) -> None:
        config = model.config
        self._gates = gates
        self._embedding = model.model.embed_tokens.weight
        self._rotary = model.model.rotary_emb
        self._norm = model.model.norm.weight
        self._head = model.lm_head.weight.t()
        first = model.model.layers[0].self_attn
        self._head_dim: int = first.head_dim
        self._scaling: float = first.scaling
        self._heads: int = config.num_attention_heads
        self._kv_heads: int = config.num_key_value_heads
        self._eps = torch.tensor(config.rms_norm_eps, device=self._embedding.device)
        layers = _ArrivingLayers(
            [
                functools.partial(self._layer, index, layer, config)
                for index, layer in enumerate(model.model.layers)
            ],
            gates,
        )
        self._layers: Iterable[_Layer] = layers if gates is not None else list(layers)

    @classmethod
    def suits(cls, model: Any) -> bool:
        """Whether every part of the model is one that this path knows."""
        linear = {type(part) for part in model.modules() if isinstance(part, nn.Linear)}
        config = model.config
        return (
            type(model).__name__ in cls._ARCHITECTURES
            and linear == {nn.Linear}
            and config.hidden_act == "silu"
            and not getattr(config, "mlp_bias", False)
            and model.model.layers[0].self_attn.o_proj.bias is None
        )

    def _layer(self, index: int, layer: Any, config: Any) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        qk_norm = None
        if hasattr(attention, "q_norm"):
            queries = attention.q_norm.weight.expand(self._heads, -1)
            keys = attention.k_norm.weight.expand(self._kv_heads, -1)
            qk_norm = torch.cat((queries, keys))
        window = getattr(attention, "sliding_window", None)
        if type(attention).__name__ == "MistralAttention":
            window = config.sliding_window
        return _Layer(
            index=index,
            input_norm=layer.input_layernorm.weight,
            qkv=tuple((part.weight.t(), part.bias) for part in projections),
            qk_norm=qk_norm,
            output=attention.o_proj.weight.t(),
            mlp_norm=layer.post_attention_layernorm.weight,
            gate=mlp.gate_proj.weight.t(),
            up=mlp.up_proj.weight.t(),
            down=mlp.down_proj.weight.t(),
            window=window,
        )

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
        step: AttentionStep,
        lora: LoraStep | None = None,
    ) -> torch.Tensor:
        if self._gates is not None:
            self._gates.wait(EMBEDDING)
        hidden = F.embedding(ids, self._embedding)
        if lora is not None:
            lora.add_embedding(ids, hidden)
        cos, sin = self._rotary(hidden, positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self._layers:
            self._attention(hidden, layer, cos, sin, step, lora)
            self._mlp(hidden, layer, lora)
        if self._gates is not None and len(rows):
            self._gates.wait(self._gates.num_groups - 1)
            self._layers, self._gates = list(self._layers), None
        hidden = self._normalise(hidden.index_select(0, rows), self._norm)
        logits = torch.mm(hidden, self._head)
        if lora is not None:
            lora.add_head(hidden, logits)
        return logits

    def adapt(self, targets: Targets) -> Sequence[Group]:
        by_name = {target.name: target for _, _, target in targets.linears()}
        return [tuple(by_name[name] for name in names) for names in _FUSED_GROUPS]

    def close(self) -> None: ...

    def _attention(
        self,
        hidden: torch.Tensor,
        layer: _Layer,
        cos: torch.Tensor,
        sin: torch.Tensor,
        step: AttentionStep,
        lora: LoraStep | None,
    ) -> None:
        """Adds the layer's attention to `hidden`, [T, hidden_size], in place."""
        normed = self._normalise(hidden, layer.input_norm)
        qkv = torch.cat([_project(normed, *part) for part in layer.qkv], dim=1)
        if lora is not None:
            sizes = [weight.shape[1] for weight, _ in layer.qkv]
            lora.add_joined(layer.index, _QKV, normed, qkv, sizes)
        qkv = qkv.view(len(hidden), -1, self._head_dim)
        num_rotated = self._heads + self._kv_heads
        rotated = qkv[:, :num_rotated]
        if layer.qk_norm is not None:
            rotated = self._normalise(rotated, layer.qk_norm)
        # x * cos + rotate_half(x) * sin: a roll by half, the sign of its first half kept in `sin`.
        turned = rotated.roll(self._head_dim // 2, -1)
        torch.mul(rotated, cos, out=rotated).addcmul_(turned, sin)
        if layer.qk_norm is not None:
            qkv[:, self._heads : num_rotated] = rotated[:, self._heads :]
        write(step, layer.index, qkv[:, self._heads :].unflatten(1, (2, self._kv_heads)))
        attended = attend(step, layer.index, rotated[:, : self._heads], self._scaling, layer.window)
        attended = attended.reshape(len(hidden), -1)
        hidden.addmm_(attended, layer.output)
        if lora is not None:
            lora.add(layer.index, _OUTPUT, attended, hidden)

    def _mlp(self, hidden: torch.Tensor, layer: _Layer, lora: LoraStep | None) -> None:
        """Adds the layer's gated MLP to `hidden`, [T, hidden_size], in place."""
        normed = self._normalise(hidden, layer.mlp_norm)
        if lora is None:
            gated = F.silu(torch.mm(normed, layer.gate), inplace=True)
            gated.mul_(torch.mm(normed, layer.up))
        else:
            gated, up = torch.mm(normed, layer.gate), torch.mm(normed, layer.up)
            lora.add(layer.index, _GATE_UP, normed, gated, up)
            gated = F.silu(gated, inplace=True).mul_(up)
        hidden.addmm_(gated, layer.down)
        if lora is not None:
            lora.add(layer.index, _DOWN, gated, hidden)

    def _normalise(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Root mean square norm over the last dimension, computed in float32."""
        wide = hidden.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.addcmul(self._eps, norm, norm, value=1 / hidden.shape[-1]).rsqrt_()
        return (wide * scale).to(hidden.dtype).mul_(weight)


def _project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.mm(hidden, weight) if bias is None else torch.addmm(bias, hidden, weight)


def choose_forward(model: nn.Module, gates: Gates | None = None) -> Forward:
    """The leaner path where it knows every part of the model."""
    return (FusedForward if FusedForward.suits(model) else ModuleForward)(model, gates)
