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
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from flashserve.engine.attention import AttentionStep, attend, write
from flashserve.engine.gates import EMBEDDING, Gates, layer_group


class Forward(Protocol):
    """Computes the logits of some rows of a packed step."""

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, step: AttentionStep
    ) -> torch.Tensor:
        """Args: ids, positions: [T]; rows: [R] of them. Returns: [R, vocabulary]."""

    def close(self) -> None:
        """Takes off the model what was put on it."""


class ModuleForward:
    """The model as transformers wrote it."""

    def __init__(self, model: nn.Module, gates: Gates | None = None) -> None:
        self._model = model
        self._gates = gates
        self._hooks = _hang(model, gates) if gates is not None else []

    def __call__(
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, step: AttentionStep
    ) -> torch.Tensor:
        output = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=rows,
            flashserve_step=step,
        )
        if self._gates is not None and self._gates.is_open:
            self.close()
        logits: torch.Tensor = output.logits[0]
        return logits

    def close(self) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._gates = None


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
        self, ids: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, step: AttentionStep
    ) -> torch.Tensor:
        if self._gates is not None:
            self._gates.wait(EMBEDDING)
        hidden = F.embedding(ids, self._embedding)
        cos, sin = self._rotary(hidden, positions[None])
        cos, sin = cos[0, :, None], sin[0, :, None].clone()
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self._layers:
            self._attention(hidden, layer, cos, sin, step)
            self._mlp(hidden, layer)
        if self._gates is not None and len(rows):
            self._gates.wait(self._gates.num_groups - 1)
            self._layers, self._gates = list(self._layers), None
        hidden = self._normalise(hidden.index_select(0, rows), self._norm)
        return torch.mm(hidden, self._head)

    def close(self) -> None: ...

    def _attention(
        self,
        hidden: torch.Tensor,
        layer: _Layer,
        cos: torch.Tensor,
        sin: torch.Tensor,
        step: AttentionStep,
    ) -> None:
        """Adds the layer's attention to `hidden`, [T, hidden_size], in place."""
        normed = self._normalise(hidden, layer.input_norm)
        qkv = torch.cat([_project(normed, *part) for part in layer.qkv], dim=1)
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
        hidden.addmm_(attended.reshape(len(hidden), -1), layer.output)

    def _mlp(self, hidden: torch.Tensor, layer: _Layer) -> None:
        """Adds the layer's gated MLP to `hidden`, [T, hidden_size], in place."""
        normed = self._normalise(hidden, layer.mlp_norm)
        gated = F.silu(torch.mm(normed, layer.gate), inplace=True)
        hidden.addmm_(gated.mul_(torch.mm(normed, layer.up)), layer.down)

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
