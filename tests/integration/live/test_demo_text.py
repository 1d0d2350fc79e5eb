"""Tokens and prompts of the real demo model equal those of transformers' AutoTokenizer."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rich.console
import transformers

from flashserve.live.chat import ChatTemplate
from flashserve.live.text import ModelText, load_text
from flashserve.store.sources.demo import convert

pytestmark = pytest.mark.integration

TEXTS = [
    "The capital of France is",
    "  leading, trailing \n\n and\ttabs  ",
    "12345 67.89 0x1F 2026-11-23",
    "Zażółć gęślą jaźń, 東京, مرحبا, ḱ",
    "\U0001f469\u200d\U0001f680\U0001f1ea\U0001f1fa e\u0301",
    "def f(x):\n    return {**x, 'a': [1, 2]}\n",
    "<|im_start|>user\nnot a turn<|im_end|>",
    "\x00\x07 \ufeff\u2028",
    "word " * 2000,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two", "tool_calls": None},
        {"role": "user", "content": "Zażółć <|im_end|>"},
    ],
]
# What checkpoints in the wild do in their templates.
TEMPLATES = {
    "indented": """{{ bos_token }}{% for m in messages %}
    {%- if m.role == 'user' %}
U: {{ m.content | trim }}
    {% else %}
{{ m.content | tojson(indent=2) }}
    {% endif %}
{% endfor %}""",
    "namespaces": """{% set ns = namespace(last='') %}{% for m in messages %}
{% set ns.last = m.content %}{% if loop.index0 > 0 %}{% continue %}{% endif %}{{ m | tojson }}
{% endfor %}{{ ns.last }}""",
    "dates": """{% if tools is defined and tools %}T{% endif %}
{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{ date_string }}{{ eos_token }}{{ pad_token or 'none' }}{% if add_generation_prompt %}A{% endif %}
""",
    "macros": """{% macro turn(m) %}<{{ m["role"] | upper }}>{{ m["content"][:2] }}{% endmacro %}
{% for m in messages %}{{ turn(m) }}{% generation %}{{ m.get('name', '-') }}{% endgeneration %}
{% endfor %}{{ dict(a=1) | tojson }}{{ messages[-1].content.startswith('H') }}""",
}


@pytest.fixture(scope="module")
def directory() -> Path:
    """The converted model that the demo and the end-to-end tests use too."""
    path = Path(__file__).parents[3] / ".demo" / "models" / "smollm2"
    convert(path, rich.console.Console(file=io.StringIO()))
    return path


@pytest.fixture(scope="module")
def ours(directory: Path) -> ModelText:
    return load_text("demo", directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers(ours: ModelText, theirs: Any, text: str) -> None:
    assert list(ours.encode(text)) == theirs(text)["input_ids"]


@pytest.mark.parametrize("messages", CHATS)
def test_chats_are_those_of_transformers(
    ours: ModelText, theirs: Any, messages: list[dict[str, Any]]
) -> None:
    wanted = theirs.apply_chat_template(messages, add_generation_prompt=True)
    assert list(ours.encode_chat(messages)) == wanted["input_ids"]


@pytest.mark.parametrize("source", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("messages", CHATS)
def test_templates_render_as_in_transformers(
    theirs: Any, source: str, messages: list[dict[str, Any]]
) -> None:
    template = ChatTemplate(source, theirs.special_tokens_map, "test")
    wanted = theirs.apply_chat_template(
        messages, chat_template=source, tokenize=False, add_generation_prompt=True
    )
    assert template.render(messages) == wanted


def test_bytes_of_tokens_make_up_the_text(ours: ModelText) -> None:
    for text in TEXTS:
        data = b"".join(ours.token_bytes(token_id) for token_id in ours.encode(text))
        assert data.decode() == text


def test_the_server_side_needs_no_tensor_library() -> None:
    code = (
        "import sys, flashserve.live.launcher, flashserve.gateway.app;"
        "sys.exit(','.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
