"""The batching engine: takes jobs, computes steps, emits tokens.

One thread owns it; `add` and `put_adapter` may be called from another one, also during a step.
"""

from __future__ import annotations

import collections
import secrets
import time
from collections.abc import Sequence as Ids
from typing import Any

import torch
from torch import nn

from flashserve.config import EngineSettings
from flashserve.engine.batching import Batcher
from flashserve.engine.blocks import BlockPool
from flashserve.engine.gates import Gates
from flashserve.engine.lora.adapters import Adapters
from flashserve.engine.lora.memory import Reader
from flashserve.engine.runner import KVShape, Runner, allocate_pool
from flashserve.engine.sampling import Draw, Drawn, sample
from flashserve.engine.sequence import Segment, Sequence
from flashserve.errors import (
    ConflictError,
    ContextLengthError,
    FlashServeError,
    InputError,
    InternalError,
    UnavailableError,
)
from flashserve.messages.work import AdapterImage, GenerateJob
from flashserve.types import AdapterId, KVUsage, SamplingParams, TensorSlice, TokenOutput


class Engine:
    """Serves one model.

    Args:
        model: from `loading.build_skeleton`, with its weights bound.
        settings: batch_invariant also turns prefix reuse off, because keys computed within
            another prompt may differ in the last bit.
        kv_pool: flat uint8 memory for the keys and values, where the weights are; allocated here
            if not given. It may have served another model before.
        eos_token_ids: tokens that end a sequence; see `loading.eos_token_ids`.
        gates: where a step waits for weights that are still to come; None: all are there.
        read_adapter: gives the tensors of adapters' images; needed if there are any.

    Raises:
        UnavailableError: the pool does not hold a single block.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: EngineSettings,
        kv_pool: torch.Tensor | None = None,
        eos_token_ids: Ids[int] = (),
        gates: Gates | None = None,
        read_adapter: Reader | None = None,
    ) -> None:
        config: Any = model.config
        self._context_tokens: int = config.max_position_embeddings
        self._vocab_size: int = config.vocab_size
        self._eos = frozenset(eos_token_ids)
        weight = next(model.parameters())
        if kv_pool is None:
            kv_pool = allocate_pool(settings.kv_bytes, weight.device)
        shape = KVShape.of(config, weight.dtype)
        block_bytes = settings.block_tokens * shape.bytes_per_token
        num_blocks = kv_pool.numel() // block_bytes
        if num_blocks == 0:
            raise UnavailableError(
                f"engine.kv_bytes is {kv_pool.numel()}, but one block of this model's keys and "
                f"values takes {block_bytes}"
            )
        self._pool = BlockPool(num_blocks, settings.block_tokens)
        self._runner = Runner(
            model,
            shape.view(kv_pool, num_blocks * settings.block_tokens),
            settings.block_tokens,
            batch_invariant=settings.batch_invariant,
            gates=gates,
        )
        self._adapters = Adapters(
            model,
            settings,
            read_adapter or _read_none,
            self._runner.adapt,
            min_rows=self._runner.min_rows,
        )
        self._batcher = Batcher(
            self._pool,
            settings.max_batch_sequences,
            settings.max_batch_tokens,
            reuse_prefixes=settings.reuse_prefixes and not settings.batch_invariant,
            whole_prompts=settings.batch_invariant,
            adapters=self._adapters.cache,
            adapter_patience=settings.adapter_patience_steps,
        )
        self._gates = gates
        self.reused: dict[str, int] = {}
        """Prompt tokens that were found in the cache, of each sequence that got its first token
        in the last step."""
        self.failed: dict[str, FlashServeError] = {}
        """Why sequences that the last step ended without a further token could not go on."""
        self.counts: collections.Counter[str] = collections.Counter()
        """Since the start: steps, tokens computed, chunks that did not end their prompt, and, of
        finished sequences, reused_tokens and preemptions."""

    @property
    def has_work(self) -> bool:
        return self.num_running + self.num_waiting > 0

    @property
    def num_running(self) -> int:
        return self._batcher.num_running

    @property
    def num_waiting(self) -> int:
        return self._batcher.num_waiting

    @property
    def waited_s(self) -> float:
        """Seconds that steps have waited for weights so far, a wait under way included."""
        return self._gates.waited_s if self._gates is not None else 0.0

    def kv_usage(self) -> KVUsage:
        return self._pool.usage()

    def close(self) -> None:
        """Leaves the model as it was before. Once; nothing is asked after it."""
        self._runner.close()

    def drop_cached(self) -> None:
        """Forgets all reusable prefixes."""
        self._pool.drop_cached()

    def add(self, job: GenerateJob) -> None:
        """Queues a sequence.

        Raises:
            InputError: token ids or parameters make no sense for this model.
            ContextLengthError: the sequence can never fit the context or the pool.
            ConflictError: a sequence of this id is not finished yet.
            FlashServeError: its adapter cannot be used; see `AdapterCache.check`.
        """
        if job.sequence_id in self._batcher:
            raise ConflictError(f"sequence {job.sequence_id} is already running")
        self._check(job)
        seed = secrets.randbits(63) if job.params.seed is None else job.params.seed
        sequence = Sequence.from_job(job, seed)
        if job.adapter_id is None:
            self._batcher.add(sequence)
            return
        self._adapters.cache.check(job.adapter_id)
        self._adapters.cache.want(job.adapter_id)
        self._batcher.add(sequence)
        self._adapters.cache.prefetch(job.adapter_id)

    def put_adapter(self, image: AdapterImage) -> None:
        """Makes an adapter known, whose bytes stay where they are until `drop_adapter` returns.

        One that does not fit is refused when a sequence is to use it. As `add`, from any thread.
        """
        self._adapters.cache.put(image)

    def prefetch_adapter(self, adapter_id: AdapterId) -> None:
        """Loads an adapter ahead of any sequence, if only those that nobody wants must give way.

        Raises:
            FlashServeError: it cannot be used; see `AdapterCache.check`. As `add`, from any thread.
        """
        self._adapters.cache.check(adapter_id)
        self._adapters.cache.prefetch(adapter_id)

    def drop_adapter(self, adapter_id: AdapterId, *, is_damaged: bool = False) -> None:
        """Forgets where an adapter's bytes are. As `add`, from any thread.

        Args:
            is_damaged: what has been loaded of it is not to be trusted. The next step ends the
                sequences that were computed with it, and forgets what is cached of them.
                Otherwise it stays usable.
        """
        self._adapters.cache.drop(adapter_id, is_damaged=is_damaged)

    @property
    def adapter_counts(self) -> collections.Counter[str]:
        """Since the start: loads, evictions, and hits, the uses of an adapter that was there."""
        return self._adapters.cache.counts

    @property
    def resident_adapters(self) -> tuple[AdapterId, ...]:
        """Those in the device's memory, least recently used first."""
        return self._adapters.cache.resident

    def abort(self, sequence_id: str) -> None:
        """Ends a sequence without a further token. An unknown or finished one is ignored."""
        if sequence_id in self._batcher:
            self._remove(sequence_id)

    def step(self) -> list[tuple[str, TokenOutput]]:
        """Computes one step and returns the tokens that it emitted, with their sequence ids."""
        self.reused, self.failed = {}, {}
        self._end_damaged()
        segments = self._schedule()
        if not segments:
            return []
        segments, lora = self._adapters.arrange(segments)
        logits = self._runner.run(segments, lora)
        self._batcher.commit(segments)
        self.counts["steps"] += 1
        num_rows = [segment.end - segment.begin for segment in segments]
        self.counts["tokens"] += sum(num_rows)
        self.counts["chunks"] += sum(
            rows > 1 and not segment.samples
            for rows, segment in zip(num_rows, segments, strict=True)
        )
        sampling = [segment.sequence for segment in segments if segment.samples]
        draws = [Draw(item.params, item.seed, item.num_emitted) for item in sampling]
        drawn = sample(logits, draws)
        now = time.monotonic()
        return [self._emit(*pair, now) for pair in zip(sampling, drawn, strict=True)]

    def _end_damaged(self) -> None:
        """Ends what was computed with damaged adapters; whoever waits for one gets it anew."""
        damaged = self._adapters.cache.take_damaged()
        for adapter_id in damaged:
            for sequence in self._batcher.computed_with(adapter_id):
                self.failed[sequence.sequence_id] = UnavailableError(
                    f"adapter {adapter_id} was damaged in memory while this request used it; its "
                    "answer cannot be trusted: send the request again"
                )
                self._remove(sequence.sequence_id)
        if damaged:
            self.drop_cached()

    def _schedule(self) -> list[Segment]:
        """The segments of the next step, after ending what cannot get its adapter."""
        segments = self._batcher.schedule()
        for adapter_id in self._batcher.waiting_adapters:
            if (error := self._adapters.cache.failure(adapter_id)) is not None:
                for sequence in self._batcher.waiting_for(adapter_id):
                    self.failed[sequence.sequence_id] = error
                    self._remove(sequence.sequence_id)
        if not segments and self._batcher.num_waiting:
            self._adapters.cache.wait_for_loads()
            segments = self._batcher.schedule()
        return segments

    def _remove(self, sequence_id: str) -> None:
        sequence = self._batcher.remove(sequence_id)
        if sequence.adapter_id is not None:
            self._adapters.cache.unwant(sequence.adapter_id)

    def _emit(self, sequence: Sequence, drawn: Drawn, now: float) -> tuple[str, TokenOutput]:
        index = sequence.num_emitted
        if index == sequence.num_given:
            self.reused[sequence.sequence_id] = sequence.num_reused
        sequence.tokens.append(drawn.token_id)
        reason = self._finish_reason(sequence, drawn)
        if reason is not None:
            self._remove(sequence.sequence_id)
            self.counts["reused_tokens"] += sequence.num_reused
            self.counts["preemptions"] += sequence.num_preemptions
        return sequence.sequence_id, TokenOutput(
            index=index,
            token_id=drawn.token_id,
            logprob=drawn.logprob,
            top_logprobs=drawn.top_logprobs,
            finish_reason=reason,
            emitted_at=now,
        )

    def _finish_reason(self, sequence: Sequence, drawn: Drawn) -> str | None:
        params = sequence.params
        if not drawn.is_valid:
            return "error"
        if drawn.token_id in params.stop_token_ids:
            return "stop"
        if drawn.token_id in self._eos and not params.ignore_eos:
            return "stop"
        return "length" if sequence.num_emitted >= params.max_tokens else None

    def _check(self, job: GenerateJob) -> None:
        _check_params(job.params)
        if not job.prompt_ids:
            raise InputError("the prompt is empty")
        for token in (*job.prompt_ids, *job.emitted_ids):
            if not 0 <= token < self._vocab_size:
                raise InputError(f"token id {token} is not in the vocabulary of {self._vocab_size}")
        num_prompt, num_new = len(job.prompt_ids), job.params.max_tokens
        if len(job.emitted_ids) >= num_new:
            raise InputError(f"max_tokens is {num_new}, and {len(job.emitted_ids)} are emitted")
        if num_prompt + num_new > self._context_tokens:
            raise ContextLengthError(
                f"prompt ({num_prompt} tokens) and max_tokens ({num_new}) exceed the model's "
                f"context of {self._context_tokens} tokens"
            )
        room = self._pool.num_blocks * self._pool.block_tokens
        if num_prompt + num_new - 1 > room:
            raise ContextLengthError(
                f"prompt ({num_prompt} tokens) and max_tokens ({num_new}) exceed the KV pool of "
                f"{room} tokens; raise engine.kv_bytes or lower max_tokens"
            )


def _read_none(tensor: TensorSlice) -> torch.Tensor:
    raise InternalError(f"tensor {tensor.name} of an adapter: this engine reads none")


def _check_params(params: SamplingParams) -> None:
    """The last line of defence: the gateway has checked and named these before."""
    if params.max_tokens < 1:
        raise InputError(f"max_tokens is {params.max_tokens}, not 1 or more")
    if not 0 <= params.temperature < float("inf"):
        raise InputError(f"temperature is {params.temperature}, not a number from 0")
    if not 0 < params.top_p <= 1:
        raise InputError(f"top_p is {params.top_p}, not above 0 and up to 1")
    if params.top_k < 0:
        raise InputError(f"top_k is {params.top_k}, not 0 or more")
    if params.logprobs is not None and params.logprobs < 0:
        raise InputError(f"logprobs is {params.logprobs}, not 0 or more")
