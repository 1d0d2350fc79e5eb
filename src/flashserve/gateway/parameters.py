"""OpenAI's and vLLM's parameters that are not served, so that none is silently ignored.

A value that leaves the answer as it is passes; any other is refused by name. Parameters that never
change the answer (user, store, metadata, service_tier, ...) are not listed, nor are unknown ones:
clients send fields of their own to servers of many kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashserve.errors import InputError

# Name -> values with which the answer is the same as without the parameter; null always is.
_BOTH: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "truncate_prompt_tokens": (),
    "prompt_logprobs": (),
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "logits_processors": ([],),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
}
_COMPLETIONS: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "prompt_embeds": (),
}
_CHAT: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "echo": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
}


def refuse_unserved(body: Mapping[str, Any], *, chat: bool) -> None:
    """Raises:
    InputError: a parameter is set that would change the answer and is not served.
    """
    table = _BOTH | (_CHAT if chat else _COMPLETIONS)
    for name, value in body.items():
        if value is None or name not in table:
            continue
        if not any(_same(value, harmless) for harmless in table[name]):
            raise InputError(f"{name} is not supported with this value", param=name)


def _same(value: object, harmless: object) -> bool:
    """Equal, and not by Python's grace alone: True is no number here."""
    return isinstance(value, bool) == isinstance(harmless, bool) and value == harmless
