"""Which models there are: checked when they are deployed, durable, known to the controller."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import structlog

from flashserve.config import DeploySettings
from flashserve.errors import ConflictError, FlashServeError, InputError, ModelNotFoundError
from flashserve.live.bounds import BoundsClock
from flashserve.live.catalogue import Catalogue
from flashserve.live.modelrows import DeployedModel
from flashserve.live.names import Names, check_name
from flashserve.live.runtime import Runtime
from flashserve.live.text import ModelText, TextCache
from flashserve.messages.events import BoundsChanged, ModelDeleted, ModelDeployed
from flashserve.messages.work import ModelFacts
from flashserve.policy.minimums import check_minimums
from flashserve.policy.schedules import NO_BOUNDS, Bounds, check_bounds
from flashserve.store import smallfiles
from flashserve.store.sources.source import check_allowed, scheme_of
from flashserve.types import ModelId, ModelSpec

KIND = "model"
_MAX_PRELOADED = 64
_MAX_SHOWN = 8
_log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class DeployOptions:
    """How a model is to be run. keep_alive_s: None follows the server."""

    keep_alive_s: float | None = None
    bounds: Bounds = NO_BOUNDS


class Deployments:
    """The catalogue's models in memory, and their tokenizers. Changes happen one at a time."""

    def __init__(
        self,
        allowed: DeploySettings,
        clock: BoundsClock,
        runtime: Runtime,
        catalogue: Catalogue,
        data_dir: Path,
        names: Names,
        adapters_of: Callable[[ModelId], Sequence[str]],
    ) -> None:
        """Args:
        clock: says what bounds mean now.
        adapters_of: the names of a model's adapters, which hold on to its weights.
        """
        self._clock = clock
        self._names = names
        self._adapters_of = adapters_of
        self._allowed = allowed
        self._runtime = runtime
        self._catalogue = catalogue
        self._data_dir = data_dir
        self._texts = TextCache()
        self._models: dict[ModelId, DeployedModel] = {}
        self._changing = asyncio.Lock()

    async def restore(self) -> None:
        """Bring every deployed model back, cold. Its source is first looked at by a request."""
        for stored in await self._catalogue.models():
            model = self._scaled(stored)
            self._warn_of_contradictions(model)
            self._models[model.spec.model_id] = model
            self._names.put(model.spec.model_id, KIND)
            await self._runtime.apply(ModelDeployed(model.spec))

    async def sweep(self) -> None:
        """Remove what is left of remote models that are deployed no more: their small files."""
        in_use = [model.directory for model in self._models.values()]
        try:
            await asyncio.to_thread(smallfiles.sweep, self._data_dir, in_use)
        except FlashServeError as error:
            _log.warning("small files of deleted models stay", reason=error.message)

    async def preload(self) -> None:
        """Load the tokenizers of the latest deployments, so that no first request waits for one."""
        latest = sorted(self._models.values(), key=lambda model: -model.created_at)
        for model in latest[:_MAX_PRELOADED]:
            try:
                await self.text(model)
            except FlashServeError as error:
                _log.warning("a deployed model cannot be served now", reason=error.message)

    def all(self) -> list[DeployedModel]:
        """By name."""
        return [self._models[model_id] for model_id in sorted(self._models)]

    def find(self, model_id: ModelId) -> DeployedModel:
        """The model of that name.

        Raises:
            ModelNotFoundError: it names the deployed models.
        """
        if (model := self._models.get(model_id)) is not None:
            return model
        raise ModelNotFoundError(
            f"model {model_id} is not deployed; {self._names.suggestion(model_id)}", param="model"
        )

    def has(self, model_id: ModelId) -> bool:
        return model_id in self._models

    async def text(self, model: DeployedModel) -> ModelText:
        """Its tokenizer and chat template.

        Raises:
            SourceError, CheckpointError: its directory has vanished, or is damaged.
        """
        return await self._texts.get(model.spec.model_id, model.directory, model.identity)

    async def deploy(
        self, name: str, source: str, options: DeployOptions, *, trusted: bool, replace: bool
    ) -> None:
        """See Service.deploy."""
        check_name(name, KIND)
        _check_keep_alive(options.keep_alive_s)
        check_bounds(options.bounds, self._num_workers)
        self._check_minimums(ModelId(name), options.bounds)
        source = absolute(source)
        if not trusted:
            allowed = self._allowed
            await asyncio.to_thread(check_allowed, source, allowed.roots, allowed.schemes)
        if not replace:
            self._check_free(ModelId(name), source)
        with self._names.claiming(name, KIND):
            await self._deploy(name, source, options, replace=replace)

    async def _deploy(
        self, name: str, source: str, options: DeployOptions, *, replace: bool
    ) -> None:
        facts = await self._runtime.nodes[0].describe(source)
        async with self._changing:
            if not replace:
                self._check_free(ModelId(name), source, facts.identity)
            self._check_minimums(ModelId(name), options.bounds)
            known = self._models.get(ModelId(name))
            if known is not None and known.identity != facts.identity:
                self._check_no_adapters(known.spec.model_id, "replaced")
            model = _deployed_model(name, source, options, facts)
            text = await self.text(model)
            spec = dataclasses.replace(model.spec, has_chat_template=text.has_chat_template)
            await self._take_on(self._scaled(dataclasses.replace(model, spec=spec)))

    def follow_schedules(self) -> None:
        """Tell the controller of every model whose schedule has begun or ended since the last."""
        for model_id, model in self._models.items():
            if model.bounds.schedule and (changed := self._scaled(model)) != model:
                self._models[model_id] = changed
                scaling = changed.spec.scaling
                _log.info("schedule", model_id=model_id, **dataclasses.asdict(scaling))
                self._runtime.post(BoundsChanged(model_id, scaling))

    def _scaled(self, model: DeployedModel) -> DeployedModel:
        """With the bounds that hold now."""
        spec = dataclasses.replace(model.spec, scaling=self._clock.scaling(model.bounds))
        return dataclasses.replace(model, spec=spec)

    @property
    def _num_workers(self) -> int:
        return sum(node.spec.num_workers for node in self._runtime.nodes)

    def _check_minimums(self, model_id: ModelId, bounds: Bounds) -> None:
        if bounds == NO_BOUNDS:
            return
        others = {
            name: model.bounds
            for name, model in self._models.items()
            if name != model_id and model.bounds != NO_BOUNDS
        }
        check_minimums(model_id, bounds, others, self._num_workers)

    def _warn_of_contradictions(self, model: DeployedModel) -> None:
        """A server that was restarted with fewer workers serves with what it has."""
        model_id = model.spec.model_id
        try:
            check_bounds(model.bounds, self._num_workers)
            self._check_minimums(model_id, model.bounds)
        except InputError as error:
            _log.warning("bounds cannot be met", model_id=model_id, reason=error.message)

    async def delete(self, name: str) -> None:
        """See Service.delete."""
        async with self._changing:
            model_id = self.find(ModelId(name)).spec.model_id
            self._check_no_adapters(model_id, "deleted")
            await self._catalogue.delete(model_id)
            del self._models[model_id]
            self._names.remove(model_id)
            await self._runtime.apply(ModelDeleted(model_id))
            await self.sweep()

    @contextlib.asynccontextmanager
    async def keeping(self, model: DeployedModel) -> AsyncIterator[None]:
        """While inside, the model is deployed with these very weights.

        Raises:
            ModelNotFoundError: it was deleted meanwhile.
            ConflictError: it was given other weights meanwhile.
        """
        async with self._changing:
            if self.find(model.spec.model_id).identity != model.identity:
                raise ConflictError(f"{model.spec.model_id} was replaced meanwhile: try again")
            yield

    async def _take_on(self, model: DeployedModel) -> None:
        """Durable first, then known to the controller."""
        model_id = model.spec.model_id
        known = self._models.get(model_id)
        if known is not None:
            model = dataclasses.replace(model, created_at=known.created_at)
        await self._catalogue.put(model)
        self._models[model_id] = model
        self._names.put(model_id, KIND)
        if known is not None and _changed_in_place(known, model):
            await self._runtime.apply(ModelDeleted(model_id))
        await self._runtime.apply(ModelDeployed(model.spec))

    def _check_no_adapters(self, model_id: ModelId, done: str) -> None:
        """Adapters are updates to these very weights."""
        if names := self._adapters_of(model_id):
            more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
            raise ConflictError(
                f"{model_id} cannot be {done} while it has adapters "
                f"({', '.join(names[:_MAX_SHOWN])}{more}): remove them first, with "
                "`flashserve adapter remove`"
            )

    def _check_free(self, model_id: ModelId, source: str, identity: str | None = None) -> None:
        """The name is free, or has this very source (as far as it is known)."""
        known = self._models.get(model_id)
        if known is None:
            return
        if known.spec.source != source:
            raise ConflictError(
                f"{model_id} is deployed from {known.spec.source}; delete it first, or replace it"
            )
        if identity not in {None, known.identity}:
            raise ConflictError(
                f"the files of {source} have changed since {model_id} was deployed; replace it"
            )


def _check_keep_alive(keep_alive_s: float | None) -> None:
    if keep_alive_s is not None and not (math.isfinite(keep_alive_s) and keep_alive_s >= 0):
        raise InputError(
            f"keep_alive_s is {keep_alive_s}, not a number from 0", param="keep_alive_s"
        )


def _changed_in_place(known: DeployedModel, model: DeployedModel) -> bool:
    """Other weights that the controller could not tell from the old ones."""
    return known.spec.source == model.spec.source and known.identity != model.identity


def absolute(source: str) -> str:
    """A directory's full path: a restarted server may run in another one."""
    return source if not source or scheme_of(source) else str(Path(source).absolute())


def _deployed_model(
    name: str, source: str, options: DeployOptions, facts: ModelFacts
) -> DeployedModel:
    spec = ModelSpec(
        model_id=ModelId(name),
        source=source,
        size_bytes=facts.size_bytes,
        lowest_tier=facts.lowest_tier,
        keep_alive_s=options.keep_alive_s,
        architecture=facts.architecture,
        context_tokens=facts.context_tokens,
        has_chat_template=facts.has_chat_template,
    )
    return DeployedModel(
        spec,
        facts.identity,
        Path(facts.directory),
        facts.kv_bytes_per_token,
        time.time(),
        options.bounds,
    )
