"""The generations under way: how each is put together, and when none is left."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import Callable

from flashserve.errors import FlashServeError
from flashserve.forecast.arrivals import series_of
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.choice import Choice
from flashserve.live.generation import Generation
from flashserve.live.modelrows import DeployedModel
from flashserve.live.requests import GenerationRequest
from flashserve.live.runtime import Runtime
from flashserve.live.text import ModelText
from flashserve.live.timing import Stopwatch
from flashserve.types import AdapterId, ModelId, RequestId, SamplingParams


@dataclasses.dataclass(frozen=True, slots=True)
class Target:
    """Who answers a request: a model, by itself or with an adapter."""

    model: DeployedModel
    text: ModelText
    adapter: RegisteredAdapter | None

    @property
    def adapter_id(self) -> AdapterId | None:
        return self.adapter.adapter_id if self.adapter else None

    @property
    def series(self) -> tuple[ModelId, ...]:
        """Under which its arrivals are counted: the model's, and MODEL:ADAPTER beside it."""
        model_id = self.model.spec.model_id
        adapter = self.adapter
        return (model_id, series_of(model_id, adapter.name)) if adapter else (model_id,)

    @property
    def name(self) -> str:
        return self.adapter.name if self.adapter else self.model.spec.model_id


class Generations:
    """Owns every Generation from its making to its end."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._running: set[Generation] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()

    def make(
        self,
        request: GenerationRequest,
        target: Target,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        on_done: Callable[[Generation], None],
    ) -> Generation:
        """A generation that is yet to be started.

        Args:
            params: of the request, with max_tokens fitted to the context.
            on_done: told at its end, however it comes.
        """
        request_id = RequestId(secrets.token_hex(12))
        choices = [
            Choice(
                index,
                request_id,
                prompt_ids,
                params,
                stop=request.stop,
                text=target.text,
                reuse_prefix=request.reuse_prefix,
                adapter_id=target.adapter_id,
            )
            for index in range(request.num_choices)
        ]
        now = self._runtime.clock.now()

        def forget(done: Generation) -> None:
            self._running.discard(done)
            if not self._running:
                self._is_idle.set()
            on_done(done)

        generation = Generation(
            self._runtime,
            choices,
            Stopwatch(
                request_id,
                target.model.spec.model_id,
                request.received_at or now,
                now,
                adapter_id=target.adapter_id,
            ),
            num_prompt_tokens=len(prompt_ids),
            tenant=request.tenant,
            adapter=target.adapter.name if target.adapter else "",
            on_done=forget,
        )
        self._running.add(generation)
        self._is_idle.clear()
        return generation

    async def drain(self, grace_s: float, error: FlashServeError) -> None:
        """Lets what runs finish within `grace_s`; the rest ends with `error`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._is_idle.wait()
        await asyncio.gather(*(one.fail(error) for one in list(self._running)))
