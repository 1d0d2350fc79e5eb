"""`run`: one prompt, its answer printed as it comes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from flashserve.cli import console
from flashserve.cli.client import Client, connect
from flashserve.cli.options import AsJson, Name, Url
from flashserve.errors import ChatTemplateError, InputError

# What a model may not send to a terminal: control characters other than tab and newline.
_NOT_FOR_TERMINALS = {code: None for code in [*range(32), *range(127, 160)] if code not in {9, 10}}


def run(
    name: Name,
    prompt: Annotated[
        str,
        typer.Argument(
            metavar="PROMPT", help="What to ask; - reads standard input.", show_default=False
        ),
    ],
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, max=2, help="0 always takes the likeliest token.")
    ] = 0.0,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Ask a model and print its answer; a cold model is started first.

    A model with a chat template answers PROMPT as a chat message, another one continues it.
    """
    if prompt == "-":
        prompt = sys.stdin.read()
    if not prompt.strip():
        raise InputError("the prompt is empty")
    parameters = {"model": name, "max_tokens": max_tokens, "temperature": temperature}
    with connect(url) as client:
        chunks = _waited_for(name, answer_chunks(client, prompt, parameters))
        if as_json:
            console.print_json(collect(chunks))
        else:
            _print_text(chunks)


def answer_chunks(
    client: Client, prompt: str, parameters: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """The stream's objects: of a chat, or of a completion if the model has no chat template."""
    body = {**parameters, "stream": True, "stream_options": {"include_usage": True}}
    messages = [{"role": "user", "content": prompt}]
    try:
        yield from client.stream("/v1/chat/completions", {**body, "messages": messages})
    except ChatTemplateError:
        yield from client.stream("/v1/completions", {**body, "prompt": prompt})


def collect(chunks: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer: text, finish_reason, usage and receipt."""
    answer: dict[str, Any] = {"text": "", "finish_reason": None, "usage": None, "receipt": None}
    for chunk in chunks:
        answer["text"] += text_of(chunk)
        for choice in chunk["choices"]:
            answer["finish_reason"] = choice.get("finish_reason") or answer["finish_reason"]
        answer["usage"] = chunk.get("usage") or answer["usage"]
        answer["receipt"] = chunk.get("flashserve") or answer["receipt"]
    return answer


def text_of(chunk: dict[str, Any]) -> str:
    """The text that a chunk of either endpoint adds to its only choice."""
    texts = (
        choice["delta"].get("content") if "delta" in choice else choice.get("text")
        for choice in chunk["choices"]
    )
    return "".join(text or "" for text in texts)


def _waited_for(name: str, chunks: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`chunks`, with a sign on the terminal until the first text is there."""
    with contextlib.ExitStack() as stack:
        if sys.stderr.isatty():
            stack.enter_context(console.waiting(f"waiting for {name}"))
        for chunk in chunks:
            if text_of(chunk):
                stack.close()
            yield chunk


def _print_text(chunks: Iterator[dict[str, Any]]) -> None:
    is_terminal = sys.stdout.isatty()
    last = ""
    for text in filter(None, map(text_of, chunks)):
        sys.stdout.write(text.translate(_NOT_FOR_TERMINALS) if is_terminal else text)
        sys.stdout.flush()
        last = text
    if not last.endswith("\n"):
        sys.stdout.write("\n")
