"""Chat templates: what they may do, what they may not, and where they are read from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flashserve.errors import CheckpointError, InputError
from flashserve.live.chat import ChatTemplate, read_chat_template, read_json, read_special_tokens

TURNS = """{{ bos_token }}{% for message in messages %}
<|{{ message['role'] }}|>{{ message.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}


def render(source: str, *messages: dict[str, Any]) -> str:
    return ChatTemplate(source, TOKENS, "here").render(messages)


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def test_a_template_sees_messages_special_tokens_and_the_generation_prompt() -> None:
    assert render(TURNS, user("hello")) == "<s><|user|>hello</s>\n<|assistant|>"


def test_json_is_not_escaped_for_html() -> None:
    assert render("{{ messages[0].content | tojson }}", user({"a": "<é>"})) == '{"a": "<é>"}'


def test_fields_without_a_value_are_as_good_as_absent() -> None:
    source = "{{ 'tool_calls' in messages[0] }}"
    assert render(source, user("x", tool_calls=None)) == "False"


def test_reasoning_is_found_under_the_name_that_a_template_reads() -> None:
    source = "{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}"
    assert render(source, user("x", reasoning="because")) == "because/because"


def test_loop_controls_and_generation_blocks_are_understood() -> None:
    source = (
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    assert render(source, user("a"), user("b")) == "a"


def test_a_template_can_state_the_date() -> None:
    assert len(render("{{ strftime_now('%Y-%m-%d') }}", user("x"))) == 10


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.missing.more }}", "no attribute"),
        ("{{ messages[0]['content'] + 1 }}", "str"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% for i in range(10000000) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_raises_is_a_bad_request_in_one_line(source: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        render(source, user("x"))
    assert caught.value.param == "messages"
    assert "\n" not in caught.value.message


def test_a_template_that_is_no_template_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja"):
        read_chat_template(tmp_path, {})


def test_the_template_file_wins_over_the_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "old"}
    template = read_chat_template(tmp_path, config)
    assert template is not None
    assert template.render([user("x")]) == "old"
    (tmp_path / "chat_template.jinja").write_text("new {{ bos_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": {"content": "<b>"}}')
    template = read_chat_template(tmp_path, config)
    assert template is not None
    assert template.render([user("x")]) == "new <b>"


def test_of_several_named_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}, 7]
    template = read_chat_template(tmp_path, {"chat_template": named})
    assert template is not None
    assert template.render([user("x")]) == "D"


@pytest.mark.parametrize("value", [None, [], [{"name": "tool_use", "template": "T"}], 5, {}])
def test_no_template_is_none(tmp_path: Path, value: object) -> None:
    assert read_chat_template(tmp_path, {"chat_template": value}) is None


def test_special_tokens_come_from_both_files_and_the_newer_wins(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "old", "unk_token": "<unk>"})
    )
    config = {
        "bos_token": {"content": "<s>", "lstrip": False},
        "add_bos_token": True,
        "pad_token": None,
        "extra_special_tokens": {"image_token": "<img>"},
    }
    assert read_special_tokens(tmp_path, config) == {
        "bos_token": "<s>",
        "unk_token": "<unk>",
        "image_token": "<img>",
    }


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_json_names_its_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer_config.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        read_json(file)
