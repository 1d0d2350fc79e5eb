"""What FlashServe can be asked to do, behind HTTP and the command line alike."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from flashserve.config import Settings
from flashserve.errors import DrainingError, FlashServeError, InternalError, error_from_code
from flashserve.forecast.arrivals import series_of
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.adapters import Adapters
from flashserve.live.adapterstatus import adapter_status, gather_adapter_stats
from flashserve.live.bounds import BoundsClock, follow
from flashserve.live.catalogue import Catalogue
from flashserve.live.demand import Demand
from flashserve.live.deployments import Deployments, DeployOptions
from flashserve.live.fitting import fit_max_tokens, kv_room_tokens
from flashserve.live.generation import Generation
from flashserve.live.generations import Generations, Target
from flashserve.live.modelrows import DeployedModel
from flashserve.live.names import Names
from flashserve.live.requests import AdapterStatus, Decision, GenerationRequest, ModelStatus
from flashserve.live.runtime import Runtime
from flashserve.live.savings import Savings
from flashserve.live.status import NO_STATS, Stats, gather_stats, gather_tiers, model_status
from flashserve.live.text import encode_prompt
from flashserve.live.tiers import bring_to_tier, take_from_tier
from flashserve.messages.events import DrainStarted
from flashserve.node.client import AdapterResidence
from flashserve.policy.schedules import NO_BOUNDS, Bounds
from flashserve.store.reporting import StoreReport
from flashserve.types import AdapterId, ModelId, ModelSpec, NodeId, SamplingParams, Tier

_CHECK_PROMPT = "Hello"


def _ignore(_: Generation) -> None:
    """Of a request that counts for nothing."""


class Service:
    """Owns what was deployed and what is being generated, from `start` to `close`.

    The runtime and the catalogue are started and closed by whoever made them (launcher.py).
    """

    def __init__(
        self, settings: Settings, runtime: Runtime, catalogue: Catalogue, savings: Savings
    ) -> None:
        self.settings = settings
        self.savings = savings
        self.draining = False
        self._runtime = runtime
        names = Names()
        self._bounds = BoundsClock(settings.scaling)
        self._deployments = Deployments(
            settings.deploy,
            self._bounds,
            runtime,
            catalogue,
            settings.data_dir,
            names,
            self._adapters_of,
        )
        self._adapters = Adapters(settings.deploy, runtime, catalogue, self._deployments, names)
        self.demand = Demand(settings, runtime, catalogue, names, self._deployments, self._adapters)
        self._generations = Generations(runtime)
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bring every deployed model back, cold."""
        await self._deployments.restore()
        await self._deployments.sweep()
        await self._adapters.restore()
        self._tasks = [
            asyncio.create_task(self.demand.run(), name="demand"),
            asyncio.create_task(self._deployments.preload(), name="tokenizers"),
            asyncio.create_task(self.savings.run(), name="savings"),
            asyncio.create_task(
                follow(self._bounds, self._deployments.follow_schedules), name="schedules"
            ),
        ]

    def deployed(self) -> dict[ModelId, ModelSpec]:
        """Every model by name, for a node that is asked for one."""
        return {model.spec.model_id: model.spec for model in self._deployments.all()}

    async def close(self) -> None:
        """End what still runs and write down what was counted. Idempotent."""
        await self.drain(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self.demand.close()
        await self.savings.flush()

    @property
    def is_ready(self) -> bool:
        """Requests are taken and there is a worker to serve them."""
        runtime = self._runtime
        return runtime.is_healthy and runtime.num_ready_workers > 0 and not self.draining

    # Generation

    async def submit(self, request: GenerationRequest) -> Generation:
        """Admit a request; its tokens come from the Generation.

        Raises:
            ModelNotFoundError, ContextLengthError, ChatTemplateError, InputError, DrainingError,
            QueueFullError, and what a failed start of the model left behind. Nothing was
            generated then.
        """
        if self.draining:
            raise DrainingError("the server is shutting down")
        model, adapter = self._adapters.resolve(request.model_id)
        target = Target(model, await self._deployments.text(model), adapter)
        prompt_ids = request.prompt_ids
        if prompt_ids is None:
            prompt_ids = await encode_prompt(target.text, request.prompt, request.messages)
        params = self._fit(request, model, len(prompt_ids))
        for series in target.series:
            self.demand.record(series)
        generation = self._begin(
            request,
            target,
            prompt_ids,
            params,
            lambda done: self._adapters.count(target.name, done.usage.completion_tokens),
        )
        await generation.start(request.deadline_s)
        return generation

    def _fit(
        self, request: GenerationRequest, model: DeployedModel, num_prompt_tokens: int
    ) -> SamplingParams:
        engine = self.settings.engine
        max_tokens = fit_max_tokens(
            num_prompt_tokens,
            request.params.max_tokens if request.max_tokens_given else None,
            model.spec.context_tokens,
            kv_room_tokens(engine.kv_bytes, model.kv_bytes_per_token, engine.block_tokens),
        )
        return dataclasses.replace(request.params, max_tokens=max_tokens)

    def _begin(
        self,
        request: GenerationRequest,
        target: Target,
        prompt_ids: tuple[int, ...],
        params: SamplingParams,
        on_done: Callable[[Generation], None] = _ignore,
    ) -> Generation:
        """From here on the target's adapter stays as it is until the generation has ended."""
        adapter = target.adapter
        if adapter is None:
            return self._generations.make(request, target, prompt_ids, params, on_done)

        def done(generation: Generation) -> None:
            self._adapters.ended(adapter)
            on_done(generation)

        generation = self._generations.make(request, target, prompt_ids, params, done)
        self._adapters.began(adapter)
        return generation

    async def drain(self, grace_s: float) -> None:
        """No new work from now on; streams may finish within `grace_s`, the rest gets an error."""
        if not self.draining:
            self.draining = True
            with contextlib.suppress(InternalError):  # logged; what runs must end all the same
                await self._runtime.apply(DrainStarted())
        error = DrainingError("the server shut down before this request was done")
        await self._generations.drain(grace_s, error)

    # Models

    def model_names(self) -> list[str]:
        return [model.spec.model_id for model in self._deployments.all()]

    def model(self, name: str) -> ModelStatus:
        """One model, without asking the nodes.

        Raises:
            ModelNotFoundError: it names the deployed models.
        """
        return self._status(self._deployments.find(ModelId(name)), NO_STATS)

    async def models(self) -> list[ModelStatus]:
        """Every deployed model, by name, with what the nodes say of their memory."""
        stats = await gather_stats(self._runtime.nodes)
        return [self._status(model, stats) for model in self._deployments.all()]

    async def tiers(self) -> dict[NodeId, StoreReport]:
        """What the tiers of every node hold and do just now."""
        return await gather_tiers(self._runtime.nodes)

    def decisions(self, limit: int = 100) -> list[Decision]:
        """The controller's latest orders and refusals with their reasons, newest first."""
        return self._runtime.decisions(limit)

    async def deploy(
        self,
        name: str,
        source: str,
        *,
        keep_alive_s: float | None = None,
        bounds: Bounds = NO_BOUNDS,
        trusted: bool,
        replace: bool = False,
    ) -> ModelStatus:
        """Check a source and make it available under a name; no bytes are moved.

        The same source again changes keep_alive_s and bounds at most. `trusted`: from this
        machine's own user, so that any source may be named.

        Raises:
            InputError: the name, keep_alive_s or the bounds make no sense; `param` says which.
            ForbiddenError: the source may not be deployed by this caller.
            ConflictError: the name has another source, and `replace` is not set.
            DeployError: the source cannot be served; the message names the file and why.
        """
        options = DeployOptions(keep_alive_s, bounds)
        await self._deployments.deploy(name, source, options, trusted=trusted, replace=replace)
        return self.model(name)

    async def delete(self, name: str) -> None:
        """Forget a model; its running streams may finish, its source stays.

        Raises:
            ModelNotFoundError: it names the deployed models.
        """
        await self._deployments.delete(name)
        await self.demand.forget(ModelId(name))
        self.savings.forget_model(ModelId(name))

    # Adapters

    async def adapters(self) -> list[AdapterStatus]:
        """Every adapter, by base and name, with its use and the cheapest way to serve it."""
        stats = await gather_adapter_stats(self._runtime.nodes)
        return [self._adapter_status(adapter, stats) for adapter in self._adapters.all()]

    def registered(self) -> list[RegisteredAdapter]:
        """Every adapter, without asking the nodes."""
        return self._adapters.all()

    async def add_adapter(
        self, base: str, name: str, source: str, *, trusted: bool, replace: bool = False
    ) -> AdapterStatus:
        """Check a LoRA adapter, let it answer once, and make it available under a name.

        The base model is started for that if it is cold. The same content again changes nothing.
        Requests under way go on with the version that they began with.

        Raises:
            InputError: the name makes no sense.
            ForbiddenError: the source may not be named by this caller.
            ModelNotFoundError: there is no such base model.
            ConflictError: the name is taken, and `replace` is not set, or is not an adapter's.
            DeployError: it cannot be served; one line that names the file and why.
            UnavailableError: the base could not be started to try it; nothing is registered.
        """
        adapter = await self._adapters.add(
            base, name, source, self._self_check, trusted=trusted, replace=replace
        )
        stats = await gather_adapter_stats(self._runtime.nodes)
        return self._adapter_status(adapter, stats)

    async def remove_adapter(self, name: str) -> None:
        """Forget an adapter; its running streams may finish, its source stays.

        Raises:
            ModelNotFoundError: it names those that are close.
        """
        base = self._adapters.find(name).spec.base
        await self._adapters.remove(name)
        await self.demand.forget(series_of(base, name))

    def prefetch_adapter(self, name: str) -> bool:
        """Bring an adapter near that requests are expected for; see Adapters.prefetch."""
        return self._adapters.prefetch(name)

    async def _self_check(self, model: DeployedModel, adapter: RegisteredAdapter) -> None:
        """One token with the adapter, through the path that every request takes."""
        if self.draining:
            raise DrainingError("the server is shutting down")
        target = Target(model, await self._deployments.text(model), adapter)
        prompt_ids = await encode_prompt(target.text, _CHECK_PROMPT, None)
        params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        request = GenerationRequest(model.spec.model_id, params)
        generation = self._begin(request, target, prompt_ids, params)
        try:
            async with contextlib.aclosing(generation):
                await generation.start(None)
                async for _ in generation:
                    pass
        except FlashServeError as error:
            raise error_from_code(
                error.code, f"{adapter.name} did not answer its first request: {error.message}"
            ) from None

    def _adapters_of(self, base: ModelId) -> Sequence[str]:
        return self._adapters.of(base)

    def _adapter_status(
        self, adapter: RegisteredAdapter, stats: Mapping[AdapterId, AdapterResidence]
    ) -> AdapterStatus:
        base = self._deployments.find(adapter.spec.base)
        return adapter_status(
            adapter, base, self._adapters, stats, self.settings, self.savings.prices
        )

    # Tiers

    async def stage(self, name: str, tier: Tier) -> ModelStatus:
        """Bring a model's bytes up to a tier (DISK or DRAM); returns when they are there.

        Raises:
            ModelNotFoundError, DeployError, UnavailableError: it did not work, and why.
        """
        model = self._deployments.find(ModelId(name))
        await bring_to_tier(self._runtime, model.spec.model_id, tier)
        return await self._fresh_status(model.spec.model_id)

    async def evict(self, name: str, tier: Tier) -> ModelStatus:
        """Free a model's bytes in a tier (DRAM or DISK) and above; returns when they are gone.

        Raises:
            ModelNotFoundError; UnavailableError: it did not work, and why.
        """
        model = self._deployments.find(ModelId(name))
        await take_from_tier(self._runtime, model.spec.model_id, tier)
        return await self._fresh_status(model.spec.model_id)

    async def _fresh_status(self, model_id: ModelId) -> ModelStatus:
        stats = await gather_stats(self._runtime.nodes)
        return self._status(self._deployments.find(model_id), stats)

    def _status(self, model: DeployedModel, stats: Stats) -> ModelStatus:
        return model_status(
            model,
            self._runtime.controller.model_view(model.spec.model_id),
            stats,
            self._runtime.clock.now(),
            self.settings.policy.keep_alive_s,
        )
