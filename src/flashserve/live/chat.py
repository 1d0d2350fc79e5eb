"""Chat templates: the Jinja program that a checkpoint ships, run as transformers runs it.

Written on jinja2 alone, because transformers' own renderer takes 0.7 s to import. What a template
may see and do follows transformers.utils.chat_template_utils; a test compares the two.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from flashserve.errors import CheckpointError, InputError

_TEMPLATE_FILE = "chat_template.jinja"
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """A compiled template together with the special tokens that it may name.

    Raises:
        CheckpointError: the source is not a Jinja template; the message names `origin`.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin}: the chat template is not valid: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt of a conversation, up to where the assistant begins to speak.

        Raises:
            InputError: the template refuses these messages, or stumbles over their form.
        """
        try:
            return self._template.render(
                messages=[_readable(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program: it may raise anything
            raise InputError(
                f"the model's chat template refuses these messages: {_reason(error)}",
                param="messages",
            ) from None


def read_chat_template(directory: Path, tokenizer_config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a checkpoint: chat_template.jinja, else tokenizer_config.json; None: none.

    Raises:
        CheckpointError: it is there and cannot be read or compiled.
    """
    special_tokens = read_special_tokens(directory, tokenizer_config)
    file = directory / _TEMPLATE_FILE
    if file.is_file():
        try:
            return ChatTemplate(file.read_text("utf-8"), special_tokens, str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from None
    source = _default_template(tokenizer_config.get("chat_template"))
    if source is None:
        return None
    return ChatTemplate(source, special_tokens, str(directory / "tokenizer_config.json"))


def read_special_tokens(directory: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """The names under which a template finds special tokens (bos_token, eos_token, ...).

    tokenizer_config.json says more than the older special_tokens_map.json, and wins.
    """
    named = {**read_json(directory / "special_tokens_map.json"), **tokenizer_config}
    extra = named.get("extra_special_tokens")
    if isinstance(extra, dict):
        named = {**extra, **named}
    tokens: dict[str, str] = {}
    for name, value in named.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            tokens[name] = content
    return tokens


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; empty where there is no such file.

    Raises:
        CheckpointError: there is one, and it holds something else.
    """
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return value


def _default_template(value: Any) -> str | None:
    """One template, or the one called "default" of several named ones."""
    entries = [entry for entry in value if isinstance(entry, dict)] if type(value) is list else []
    for entry in entries:
        if entry.get("name") == "default":
            value = entry.get("template")
    return value if isinstance(value, str) else None


def _readable(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates expect it: no empty fields, reasoning under both its names."""
    readable = {key: value for key, value in message.items() if value is not None}
    reasoning = next((readable[name] for name in _REASONING_FIELDS if name in readable), None)
    if reasoning is not None:
        readable = {"thinking": reasoning, **readable, "reasoning_content": reasoning}
    return readable


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n", maxsplit=1)[0] or type(error).__name__


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here: nothing."""

    tags = {"generation"}  # noqa: RUF012  jinja2 declares it as an instance attribute

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes for HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(template: str) -> str:
    """The local time, as transformers has it: templates state today's date."""
    return datetime.datetime.now().astimezone().strftime(template)
