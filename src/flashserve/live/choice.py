"""One completion of a request: from the tokens of its replicas to the text that a client sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from flashserve.engine.detokenize import Detokenizer
from flashserve.engine.stopping import StopMatcher
from flashserve.errors import InternalError
from flashserve.live.requests import TextChunk, TokenLogprob
from flashserve.live.text import ModelText
from flashserve.messages.work import GenerateJob
from flashserve.types import AdapterId, RequestId, SamplingParams, TokenOutput

_PREFIX_TOKENS = 64
"""Prompts that share as many are taken to share what a replica has cached of them."""


class Choice:
    """Keeps what has been emitted, so that any replica can go on where another one stopped."""

    def __init__(
        self,
        index: int,
        request_id: RequestId,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        *,
        stop: Sequence[str],
        text: ModelText,
        reuse_prefix: bool = True,
        adapter_id: AdapterId | None = None,
    ) -> None:
        """Choice `index` of a request draws with seed + index, when there is a seed."""
        if params.seed is not None:
            params = dataclasses.replace(params, seed=params.seed + index)
        self.index = index
        self.is_finished = False
        self.num_cached = 0
        """Tokens of the prompt that its first token did not have to compute."""
        self._request_id = request_id
        self._prompt_ids = prompt_ids
        self._params = params
        self._reuse_prefix = reuse_prefix
        self._adapter_id = adapter_id
        self._text = text
        self._detokenizer = Detokenizer(text.tokenizer)
        self._matcher = StopMatcher(stop)
        self._emitted_ids: list[int] = []
        self._num_jobs = 0

    @property
    def prefix(self) -> int | None:
        """Equal for prompts that begin with the same tokens, under the same adapter; None for
        prompts that are too short to share anything.
        """
        if not self._reuse_prefix or len(self._prompt_ids) < _PREFIX_TOKENS:
            return None
        return hash((self._adapter_id, self._prompt_ids[:_PREFIX_TOKENS]))

    @property
    def num_tokens(self) -> int:
        """Tokens up to and including the one that ended the choice."""
        return len(self._emitted_ids)

    def next_job(self) -> GenerateJob:
        """The rest of this choice, for a replica that has nothing of it."""
        self._num_jobs += 1
        return GenerateJob(
            sequence_id=f"{self._request_id}.{self.index}.{self._num_jobs}",
            prompt_ids=self._prompt_ids,
            params=self._params,
            emitted_ids=tuple(self._emitted_ids),
            salt=self._adapter_id or "",
            reuse_prefix=self._reuse_prefix,
            adapter_id=self._adapter_id,
        )

    def began(self, num_reused: int) -> None:
        """A replica has begun, with so many tokens cached: those of the prompt, and of what was
        emitted before, which count for nobody.
        """
        if not self._emitted_ids:
            self.num_cached = min(num_reused, len(self._prompt_ids))

    def push(self, tokens: Sequence[TokenOutput]) -> TextChunk:
        """The chunk that these tokens make. Those after a completed stop string do not count.

        Raises:
            InternalError: the model's output was no number, or a token was left out or repeated.
        """
        pieces: list[str] = []
        logprobs: list[TokenLogprob] = []
        num_before = self.num_tokens
        finish_reason: str | None = None
        emitted_at = 0.0
        for token in tokens:
            if token.finish_reason not in {None, "stop", "length"}:
                raise InternalError(f"the model's output broke off: {token.finish_reason}")
            self._accept(token)
            emitted_at = token.emitted_at
            if token.logprob is not None:
                logprobs.append(self._logprob(token, token.logprob))
            piece, finish_reason = self._text_of(token)
            pieces.append(piece)
            if finish_reason is not None:
                self.is_finished = True
                break
        return TextChunk(
            choice=self.index,
            text="".join(pieces),
            num_tokens=self.num_tokens - num_before,
            logprobs=tuple(logprobs) if self._params.logprobs is not None else None,
            finish_reason=finish_reason,
            emitted_at=emitted_at,
        )

    def _accept(self, token: TokenOutput) -> None:
        if token.index != self.num_tokens:
            raise InternalError(
                f"sequence {self._request_id}.{self.index}: token {token.index} came where"
                f" {self.num_tokens} was due"
            )
        self._emitted_ids.append(token.token_id)

    def _text_of(self, token: TokenOutput) -> tuple[str, str | None]:
        """What a client may see now, and why the choice ends here if it does.

        The token that ends a sequence by itself (end of text, a stop id) has no text.
        """
        text = "" if token.finish_reason == "stop" else self._detokenizer.push(token.token_id)
        if token.finish_reason is not None:
            text += self._detokenizer.flush()
        piece, stopped = self._matcher.push(text)
        if stopped:
            return piece, "stop"
        if token.finish_reason is not None:
            piece += self._matcher.flush()
        return piece, token.finish_reason

    def _logprob(self, token: TokenOutput, logprob: float) -> TokenLogprob:
        text, text_bytes = self._shown(token.token_id)
        top = tuple((*self._shown(token_id), value) for token_id, value in token.top_logprobs)
        return TokenLogprob(text, text_bytes, logprob, top)

    def _shown(self, token_id: int) -> tuple[str, bytes]:
        """A token alone: its bytes, and them as text (a part of a character shows as U+FFFD)."""
        token_bytes = self._text.token_bytes(token_id)
        return token_bytes.decode(errors="replace"), token_bytes
