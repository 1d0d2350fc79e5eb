"""Does a model that comes back to a device still compute what it computed before?

A fixed prompt in a batch of one; the logits of its last token are compared with a reference that
the same checkpoint left on the same kind of device, in the same dtype, with the same libraries.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import transformers
from torch import nn

from flashserve.engine.attention import AttentionStep, Span
from flashserve.engine.runner import KVShape
from flashserve.errors import SelfCheckError

NUM_TOKENS = 16
_LOGITS = "logits"
# Largest difference that is still the same result, as a share of the largest logit. Equal shapes
# on one device give equal bits as a rule; kernels chosen by free memory or load may not.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class CheckKey:
    """What a reference holds for; another one of these may differ in the last bits or in all."""

    identity: str
    """Of the checkpoint's content."""
    device: str
    dtype: str
    versions: str

    @classmethod
    def of(cls, identity: str, device: torch.device, dtype: torch.dtype) -> CheckKey:
        versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
        return cls(identity, _device_name(device), str(dtype), versions)

    def __str__(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


class SelfCheck:
    """The reference of one key: a small file in `directory`, made by the first load."""

    def __init__(self, directory: Path, key: CheckKey) -> None:
        self._key = str(key)
        self._dtype = key.dtype
        name = hashlib.blake2b(self._key.encode(), digest_size=16).hexdigest()
        self.path = directory / f"{name}.safetensors"

    def reference(self) -> torch.Tensor | None:
        """The logits recorded for this key; None when there are none that can be read."""
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get("key") != self._key:
                    return None
                logits: torch.Tensor = file.get_tensor(_LOGITS)
                return logits
        except FileNotFoundError:
            return None
        except (OSError, safetensors.SafetensorError) as error:
            _log.warning("%s is no readable reference and is made anew: %s", self.path, error)
            return None

    def record(self, logits: torch.Tensor) -> None:
        """Keeps `logits`, [vocabulary], as the reference; the file is whole or not there.

        Raises:
            SelfCheckError: they are not finite, so they can be nobody's reference.
        """
        if not bool(logits.isfinite().all()):
            raise SelfCheckError("the self-check's logits are not finite: the weights are damaged")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(f".{os.getpid()}.part")
        kept = {_LOGITS: logits.detach().to("cpu", torch.float32).contiguous()}
        safetensors.torch.save_file(kept, partial, metadata={"key": self._key})
        partial.replace(self.path)

    def compare(self, logits: torch.Tensor) -> bool:
        """Records `logits` if they are the first of this key; false then, true when they agree.

        Raises:
            SelfCheckError: they differ from the reference, or are not finite.
        """
        reference = self.reference()
        if reference is None:
            self.record(logits)
            return False
        found = logits.detach().to("cpu", torch.float32)
        if found.shape != reference.shape:
            raise SelfCheckError(
                f"the self-check gave {list(found.shape)} logits, its reference has "
                f"{list(reference.shape)}"
            )
        allowed = _tolerance(self._dtype) * max(float(reference.abs().max()), 1e-6)
        largest = float((found - reference).abs().max())
        if not largest <= allowed:  # also when it is not a number
            raise SelfCheckError(
                f"the self-check's logits differ by {largest:.3g} from those recorded for this "
                f"checkpoint, device and library ({allowed:.3g} is allowed): the weights on the "
                "device are not those that were loaded"
            )
        return True


def _tolerance(dtype: str) -> float:
    return next(
        (value for known, value in _TOLERANCES.items() if str(known) == dtype),
        max(_TOLERANCES.values()),
    )


def check_ids(vocabulary: int) -> torch.Tensor:
    """The fixed prompt, [NUM_TOKENS]: tokens from all over the vocabulary."""
    return (torch.arange(NUM_TOKENS) * 7919 + 13) % vocabulary


@torch.inference_mode()
def check_logits(model: nn.Module, device: torch.device) -> torch.Tensor:
    """The last logits, [vocabulary], of the fixed prompt alone in a batch.

    Args:
        model: one of `loading.build_skeleton`, with its weights on `device`.
    """
    config = model.config
    dtype = model.get_input_embeddings().weight.dtype
    shape = KVShape.of(config, dtype)
    with torch.device(device):
        pool = shape.view(
            torch.zeros(NUM_TOKENS * shape.bytes_per_token, dtype=torch.uint8), NUM_TOKENS
        )
        slots = slice(0, NUM_TOKENS)
        step = AttentionStep(pool, [Span(pool, 0, 0, NUM_TOKENS, slots)], slots)
        output = model(
            input_ids=check_ids(config.vocab_size).to(device)[None],
            position_ids=torch.arange(NUM_TOKENS)[None],
            use_cache=False,
            logits_to_keep=1,
            flashserve_step=step,
        )
    logits: torch.Tensor = output.logits[0, -1]
    return logits
