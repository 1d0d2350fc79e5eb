"""What FlashServe can be asked to do, behind HTTP and the command line alike."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import secrets
import time
from pathlib import Path

import structlog

from flashserve.config import Settings
from flashserve.errors import (
    ConflictError,
    DrainingError,
    FlashServeError,
    InputError,
    InternalError,
    ModelNotFoundError,
)
from flashserve.live.catalogue import Catalogue, DeployedModel
from flashserve.live.choice import Choice
from flashserve.live.fitting import fit_max_tokens, kv_room_tokens
from flashserve.live.generation import Generation
from flashserve.live.recorder import ArrivalRecorder
from flashserve.live.requests import Decision, GenerationRequest, ModelStatus
from flashserve.live.runtime import Runtime
from flashserve.live.status import NO_STATS, Stats, gather_stats, model_status
from flashserve.live.text import ModelText, TextCache, encode_prompt
from flashserve.live.tiers import bring_to_tier, take_from_tier
from flashserve.live.timing import Stopwatch
from flashserve.messages.events import DrainStarted, ModelDeleted, ModelDeployed
from flashserve.messages.work import ModelFacts
from flashserve.store.source import check_allowed, scheme_of
from flashserve.types import MODEL_NAME, ModelId, ModelSpec, RequestId, Tier

_MAX_NAMES_IN_ERROR = 20
_MAX_PRELOADED = 64
_log = structlog.get_logger(__name__)


class Service:
    """Owns what was deployed and what is being generated, from `start` to `close`.

    The runtime and the catalogue are started and closed by whoever made them (launcher.py).
    """

    def __init__(self, settings: Settings, runtime: Runtime, catalogue: Catalogue) -> None:
        self.settings = settings
        self.draining = False
        self._runtime = runtime
        self._catalogue = catalogue
        self._recorder = ArrivalRecorder(catalogue)
        self._texts = TextCache()
        self._models: dict[ModelId, DeployedModel] = {}
        self._changing = asyncio.Lock()
        self._generations: set[Generation] = set()
        self._is_idle = asyncio.Event()
        self._is_idle.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Bring every deployed model back, cold. Its source is first looked at by a request."""
        for model in await self._catalogue.models():
            self._models[model.spec.model_id] = model
            await self._runtime.apply(ModelDeployed(model.spec))
        self._tasks = [
            asyncio.create_task(self._recorder.run(), name="arrivals"),
            asyncio.create_task(self._preload(), name="tokenizers"),
        ]

    async def close(self) -> None:
        """End what still runs and write down what was counted. Idempotent."""
        await self.drain(0.0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._recorder.flush()

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
        model = self._find(request.model_id)
        text = await self._text(model)
        prompt_ids = request.prompt_ids
        if prompt_ids is None:
            prompt_ids = await encode_prompt(text, request.prompt, request.messages)
        generation = self._generation(request, model, text, prompt_ids)
        self._recorder.record(model.spec.model_id)
        await generation.start(request.deadline_s)
        return generation

    def _generation(
        self,
        request: GenerationRequest,
        model: DeployedModel,
        text: ModelText,
        prompt_ids: tuple[int, ...],
    ) -> Generation:
        engine = self.settings.engine
        max_tokens = fit_max_tokens(
            len(prompt_ids),
            request.params.max_tokens if request.max_tokens_given else None,
            model.spec.context_tokens,
            kv_room_tokens(engine.kv_bytes, model.kv_bytes_per_token, engine.block_tokens),
        )
        params = dataclasses.replace(request.params, max_tokens=max_tokens)
        request_id = RequestId(secrets.token_hex(12))
        choices = [
            Choice(
                index,
                request_id,
                prompt_ids,
                params,
                stop=request.stop,
                text=text,
                reuse_prefix=request.reuse_prefix,
            )
            for index in range(request.num_choices)
        ]
        now = self._runtime.clock.now()
        stopwatch = Stopwatch(request_id, model.spec.model_id, request.received_at or now, now)
        generation = Generation(
            self._runtime,
            choices,
            stopwatch,
            num_prompt_tokens=len(prompt_ids),
            on_done=self._forget_generation,
        )
        self._generations.add(generation)
        self._is_idle.clear()
        return generation

    def _forget_generation(self, generation: Generation) -> None:
        self._generations.discard(generation)
        if not self._generations:
            self._is_idle.set()

    async def drain(self, grace_s: float) -> None:
        """No new work from now on; streams may finish within `grace_s`, the rest gets an error."""
        if not self.draining:
            self.draining = True
            with contextlib.suppress(InternalError):  # logged; what runs must end all the same
                await self._runtime.apply(DrainStarted())
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._is_idle.wait()
        error = DrainingError("the server shut down before this request was done")
        await asyncio.gather(*(one.fail(error) for one in list(self._generations)))

    # What is deployed

    def model_names(self) -> list[str]:
        return sorted(self._models)

    def model(self, name: str) -> ModelStatus:
        """One model, without asking the nodes.

        Raises:
            ModelNotFoundError: it names the deployed models.
        """
        return self._status(self._find(ModelId(name)), NO_STATS)

    async def models(self) -> list[ModelStatus]:
        """Every deployed model, by name, with what the nodes say of their memory."""
        stats = await gather_stats(self._runtime.nodes)
        return [self._status(self._models[ModelId(name)], stats) for name in self.model_names()]

    def decisions(self, limit: int = 100) -> list[Decision]:
        """The controller's latest orders and refusals with their reasons, newest first."""
        return self._runtime.decisions(limit)

    async def deploy(
        self,
        name: str,
        source: str,
        *,
        keep_alive_s: float | None = None,
        trusted: bool,
        replace: bool = False,
    ) -> ModelStatus:
        """Check a source and make it available under a name; no bytes are moved.

        The same source again changes keep_alive_s at most. `trusted`: from this machine's own
        user, so that any source may be named.

        Raises:
            InputError: the name or keep_alive_s makes no sense.
            ForbiddenError: the source may not be deployed by this caller.
            ConflictError: the name has another source, and `replace` is not set.
            DeployError: the source cannot be served; the message names the file and why.
        """
        _check_name(name)
        if keep_alive_s is not None and not (math.isfinite(keep_alive_s) and keep_alive_s >= 0):
            raise InputError(
                f"keep_alive_s is {keep_alive_s}, not a number from 0", param="keep_alive_s"
            )
        source = _absolute(source)
        if not trusted:
            allowed = self.settings.deploy
            await asyncio.to_thread(check_allowed, source, allowed.roots, allowed.schemes)
        self._check_taken(ModelId(name), source, None, replace=replace)
        facts = await self._runtime.nodes[0].describe(source)
        async with self._changing:
            self._check_taken(ModelId(name), source, facts.identity, replace=replace)
            model = _deployed_model(name, source, keep_alive_s, facts)
            text = await self._text(model)
            spec = dataclasses.replace(model.spec, has_chat_template=text.has_chat_template)
            known = self._models.get(spec.model_id)
            if known is not None:
                model = dataclasses.replace(model, created_at=known.created_at)
            await self._take_on(dataclasses.replace(model, spec=spec))
        return self.model(name)

    async def delete(self, name: str) -> None:
        """Forget a model; its running streams may finish, its source stays.

        Raises:
            ModelNotFoundError: it names the deployed models.
        """
        async with self._changing:
            model_id = self._find(ModelId(name)).spec.model_id
            await self._catalogue.delete(model_id)
            del self._models[model_id]
            await self._runtime.apply(ModelDeleted(model_id))

    async def stage(self, name: str, tier: Tier) -> ModelStatus:
        """Bring a model's bytes up to a tier (DISK or DRAM); returns when they are there.

        Raises:
            ModelNotFoundError, DeployError, UnavailableError: it did not work, and why.
        """
        await bring_to_tier(self._runtime, self._find(ModelId(name)).spec.model_id, tier)
        return await self._fresh_status(ModelId(name))

    async def evict(self, name: str, tier: Tier) -> ModelStatus:
        """Free a model's bytes in a tier (DRAM or DISK) and above; returns when they are gone.

        Raises:
            ModelNotFoundError; UnavailableError: it did not work, and why.
        """
        await take_from_tier(self._runtime, self._find(ModelId(name)).spec.model_id, tier)
        return await self._fresh_status(ModelId(name))

    async def _take_on(self, model: DeployedModel) -> None:
        """Durable first, then known to the controller."""
        await self._catalogue.put(model)
        known = self._models.get(model.spec.model_id)
        self._models[model.spec.model_id] = model
        if known is not None and _changed_in_place(known, model):
            await self._runtime.apply(ModelDeleted(model.spec.model_id))
        await self._runtime.apply(ModelDeployed(model.spec))

    def _check_taken(
        self, model_id: ModelId, source: str, identity: str | None, *, replace: bool
    ) -> None:
        known = self._models.get(model_id)
        if known is None or replace:
            return
        if known.spec.source != source:
            raise ConflictError(
                f"{model_id} is deployed from {known.spec.source}; delete it first, or replace it"
            )
        if identity not in {None, known.identity}:
            raise ConflictError(
                f"the files of {source} have changed since {model_id} was deployed; replace it"
            )

    def _find(self, model_id: ModelId) -> DeployedModel:
        if (model := self._models.get(model_id)) is not None:
            return model
        names = self.model_names()
        listed = ", ".join(names[:_MAX_NAMES_IN_ERROR]) or "none"
        more = f" and {len(names) - _MAX_NAMES_IN_ERROR} more"
        more = more if len(names) > _MAX_NAMES_IN_ERROR else ""
        raise ModelNotFoundError(
            f"model {model_id} is not deployed; deployed: {listed}{more}", param="model"
        )

    async def _fresh_status(self, model_id: ModelId) -> ModelStatus:
        return self._status(self._find(model_id), await gather_stats(self._runtime.nodes))

    def _status(self, model: DeployedModel, stats: Stats) -> ModelStatus:
        return model_status(
            model,
            self._runtime.controller.model_view(model.spec.model_id),
            stats,
            self._runtime.clock.now(),
            self.settings.policy.keep_alive_s,
        )

    async def _text(self, model: DeployedModel) -> ModelText:
        return await self._texts.get(model.spec.model_id, model.directory, model.identity)

    async def _preload(self) -> None:
        """Load the tokenizers of the latest deployments, so that no first request waits for one."""
        latest = sorted(self._models.values(), key=lambda model: -model.created_at)
        for model in latest[:_MAX_PRELOADED]:
            try:
                await self._text(model)
            except FlashServeError as error:
                _log.warning("a deployed model cannot be served now", reason=error.message)


def _check_name(name: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        raise InputError(
            f"model name {name[:130]!r} does not match {MODEL_NAME.pattern}", param="name"
        )


def _changed_in_place(known: DeployedModel, model: DeployedModel) -> bool:
    """Other weights that the controller could not tell from the old ones."""
    return known.spec.source == model.spec.source and known.identity != model.identity


def _absolute(source: str) -> str:
    """A directory's full path: a restarted server may run in another one."""
    return source if scheme_of(source) else str(Path(source).absolute())


def _deployed_model(
    name: str, source: str, keep_alive_s: float | None, facts: ModelFacts
) -> DeployedModel:
    spec = ModelSpec(
        model_id=ModelId(name),
        source=source,
        size_bytes=facts.size_bytes,
        lowest_tier=facts.lowest_tier,
        keep_alive_s=keep_alive_s,
        architecture=facts.architecture,
        context_tokens=facts.context_tokens,
        has_chat_template=facts.has_chat_template,
    )
    return DeployedModel(
        spec, facts.identity, Path(facts.directory), facts.kv_bytes_per_token, time.time()
    )
