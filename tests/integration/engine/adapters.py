"""Random adapters made by PEFT over the tiny models, and PEFT's own answers."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import peft
import torch
from tests.integration.engine.families import reference
from torch import nn

from flashserve.messages.work import AdapterImage, LoraLayer
from flashserve.types import AdapterId, TensorSlice

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
_PREFIX = "base_model.model."
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}


@dataclasses.dataclass
class Made:
    """An adapter as the engine gets it."""

    image: AdapterImage
    tensors: dict[str, torch.Tensor]

    @property
    def adapter_id(self) -> AdapterId:
        return self.image.adapter_id


class Peft:
    """PEFT's model with adapters that answer otherwise than their base.

    Args:
        model: transformers' own; it is copied.
    """

    def __init__(self, model: nn.Module, configs: dict[str, peft.LoraConfig]) -> None:
        self.configs = configs
        names = list(configs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names that transformers 5 has deprecated
            self.model: Any = peft.get_peft_model(copy.deepcopy(model), configs[names[0]], names[0])
            for name in names[1:]:
                self.model.add_adapter(name, configs[name])
        torch.manual_seed(1)
        with torch.no_grad():
            for key, parameter in self.model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(
                        torch.randn(parameter.shape) * 0.6 * parameter.shape[-1] ** -0.5
                    )
        self.model.eval()

    def generate(self, name: str | None, prompt: list[int], num_tokens: int) -> list[int]:
        """Greedy continuation of one prompt alone, by an adapter or by the base."""
        ids = torch.tensor([prompt])
        options = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": num_tokens,
            "do_sample": False,
            "eos_token_id": None,
            "pad_token_id": 0,
        }
        if name is None:
            with self.model.disable_adapter():
                output = self.model.generate(input_ids=ids, **options)
        else:
            self.model.set_adapter(name)
            output = self.model.generate(input_ids=ids, **options)
        continuation: list[int] = output[0, len(prompt) :].tolist()
        return continuation

    @torch.no_grad()
    def logits(self, name: str | None, prompt: list[int]) -> torch.Tensor:
        """Of the last token, [vocabulary]."""
        ids = torch.tensor([prompt])
        if name is None:
            with self.model.disable_adapter():
                return self.model(ids).logits[0, -1]
        self.model.set_adapter(name)
        return self.model(ids).logits[0, -1]

    def image(self, name: str, version: int = 1) -> Made:
        """The adapter by the names under which PEFT saves it."""
        state = peft.get_peft_model_state_dict(
            self.model, adapter_name=name, save_embedding_layers=False
        )
        adapter_id = AdapterId(f"{name}@{version}")
        tensors: dict[str, torch.Tensor] = {}
        layers: dict[str, dict[str, TensorSlice]] = {}
        for key, value in state.items():
            stem = key.removeprefix(_PREFIX).removesuffix(".weight")
            module, _, leaf = stem.rpartition(".lora_")
            slice_name = f"{adapter_id}/{key}"
            tensors[slice_name] = value.detach().clone()
            num_bytes = value.numel() * value.element_size()
            layers.setdefault(module, {})[leaf[-1]] = TensorSlice(
                slice_name, _DTYPES[value.dtype], tuple(value.shape), 0, num_bytes
            )
        image = AdapterImage(
            adapter_id,
            tuple(
                LoraLayer(module, self._scaling(name, module), parts["A"], parts["B"])
                for module, parts in layers.items()
            ),
        )
        return Made(image, tensors)

    def _scaling(self, name: str, module: str) -> float:
        scaling: float = self.model.base_model.model.get_submodule(module).scaling[name]
        return scaling


def config(rank: int, targets: list[str] | str = "all-linear", **changes: Any) -> peft.LoraConfig:
    options = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, **changes}
    return peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **options)


def make_peft(family: str, configs: dict[str, peft.LoraConfig]) -> Peft:
    return Peft(reference(family), configs)
