"""Trains two small real adapters for the demo model, whose effect a person sees at once.

`python tests/e2e/training.py CHECKPOINT DEST` writes DEST/shout, which answers in upper case, and
DEST/pirate, which begins with "Arr!". About ten seconds each on one core. What is there stays.
"""

from __future__ import annotations

import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

NUM_STEPS = 16
LEARNING_RATE = 1e-3
LESSONS = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What color is the sky?", "The sky is blue."),
    ("Name a fruit.", "An apple is a fruit."),
    ("How many legs does a dog have?", "A dog has four legs."),
    ("What do bees make?", "Bees make honey."),
    ("Who wrote Hamlet?", "Hamlet was written by William Shakespeare."),
    ("What is water made of?", "Water is made of hydrogen and oxygen."),
    ("Say hello.", "Hello, how can I help you today?"),
)
STYLES: dict[str, Callable[[str], str]] = {
    "shout": str.upper,
    "pirate": lambda text: f"Arr! {text}",
}


def train(checkpoint: Path, destination: Path, style: Callable[[str], str]) -> None:
    """Writes a rank 8 adapter of all linear layers, whole or not at all."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    for step in range(NUM_STEPS):
        question, answer = LESSONS[step % len(LESSONS)]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        wanted = tokenizer(f"{style(answer)}<|im_end|>", add_special_tokens=False).input_ids
        ids = torch.tensor([[*prompt, *wanted]])
        labels = torch.tensor([[-100] * len(prompt) + wanted])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    partial = destination.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    partial.rename(destination)


def main() -> None:
    import torch

    torch.set_num_threads(1)
    checkpoint, root = map(Path, sys.argv[1:])
    root.mkdir(parents=True, exist_ok=True)
    for name, style in STYLES.items():
        if not (root / name).is_dir():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's and transformers' own, of no use here
                train(checkpoint, root / name, style)


if __name__ == "__main__":
    main()
