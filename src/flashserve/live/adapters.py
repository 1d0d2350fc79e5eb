"""The adapters of each model: checked when they are added, durable, known to the nodes.

A version of an adapter never changes. Another one takes the name over for requests to come; those
under way go on with the weights that they began with, and the nodes may forget a version when the
last of them has ended.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import time
import weakref
from collections.abc import Awaitable, Callable

from flashserve.config import DeploySettings
from flashserve.errors import ConflictError, ModelNotFoundError
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.live.catalogue import Catalogue
from flashserve.live.deployments import Deployments, absolute
from flashserve.live.modelrows import DeployedModel
from flashserve.live.names import Names, check_name, suggestion
from flashserve.live.runtime import Runtime
from flashserve.node.client import Node
from flashserve.store.sources.source import check_allowed
from flashserve.types import AdapterId, AdapterSpec, ModelId

KIND = "adapter"


@dataclasses.dataclass(slots=True)
class Use:
    """What was asked of an adapter, or of a model as such, since this server started."""

    since: float
    """time.monotonic() of the first request; counts below begin there."""
    num_requests: int = 0
    num_tokens: int = 0
    """Generated."""
    last_at: float = 0.0


SelfCheck = Callable[[DeployedModel, RegisteredAdapter], Awaitable[None]]
"""Asks an adapter for a token; raises FlashServeError when none comes."""


class Adapters:
    """The catalogue's adapters in memory. Changes of one name happen one at a time."""

    def __init__(
        self,
        allowed: DeploySettings,
        runtime: Runtime,
        catalogue: Catalogue,
        deployments: Deployments,
        names: Names,
    ) -> None:
        self._allowed = allowed
        self._runtime = runtime
        self._catalogue = catalogue
        self._deployments = deployments
        self._names = names
        self._adapters: dict[str, RegisteredAdapter] = {}
        self._users: collections.Counter[AdapterId] = collections.Counter()
        self.uses: dict[str, Use] = {}
        """By the name of a model or adapter."""
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def restore(self) -> None:
        """Bring every adapter back; none is loaded before a request names it."""
        for adapter in await self._catalogue.adapters():
            self._put(adapter)
            self._declare(adapter)

    def all(self) -> list[RegisteredAdapter]:
        """By base, then by name."""
        return sorted(self._adapters.values(), key=lambda each: (each.spec.base, each.name))

    def of(self, base: ModelId) -> list[str]:
        """The names of a model's adapters."""
        return sorted(each.name for each in self._adapters.values() if each.spec.base == base)

    def find(self, name: str) -> RegisteredAdapter:
        """The adapter of that name.

        Raises:
            ModelNotFoundError: it names those that are close.
        """
        if (adapter := self._adapters.get(name)) is not None:
            return adapter
        raise ModelNotFoundError(
            f"there is no adapter {name}; {self._names.suggestion(name)}", param="name"
        )

    def resolve(self, asked: str) -> tuple[DeployedModel, RegisteredAdapter | None]:
        """What a request's `model` means: a model, an adapter, or MODEL:ADAPTER.

        Raises:
            ModelNotFoundError: it names the models and adapters that are close.
        """
        base, colon, name = asked.partition(":")
        adapter = self._adapters.get(name if colon else asked)
        if adapter is not None and base in {adapter.spec.base, asked}:
            return self._deployments.find(adapter.spec.base), adapter
        if colon and self._deployments.has(ModelId(base)):
            known = suggestion(name, self.of(ModelId(base)), "it has")
            raise ModelNotFoundError(f"model {base} has no adapter {name}; {known}", param="model")
        return self._deployments.find(ModelId(asked)), None

    async def add(
        self, base: str, name: str, source: str, check: SelfCheck, *, trusted: bool, replace: bool
    ) -> RegisteredAdapter:
        """See Service.add_adapter."""
        check_name(name, KIND)
        source = absolute(source)
        model = self._deployments.find(ModelId(base))
        if not trusted:
            allowed = self._allowed
            await asyncio.to_thread(check_allowed, source, allowed.roots, allowed.schemes)
        with self._names.claiming(name, KIND):
            async with self._turn(name):
                return await self._add(model, name, source, check, replace=replace)

    async def remove(self, name: str) -> None:
        """See Service.remove_adapter."""
        async with self._turn(name):
            adapter = self.find(name)
            await self._catalogue.delete_adapter(name)
            del self._adapters[name]
            self._names.remove(name)
            self.uses.pop(name, None)
            self._retire_unused(adapter.adapter_id)

    def began(self, adapter: RegisteredAdapter) -> None:
        """A request begins with this version, whose bytes may be brought near at once."""
        self._users[adapter.adapter_id] += 1
        for node in self._nodes_of(adapter.spec.base):
            node.prefetch_adapter(adapter.adapter_id)

    def prefetch(self, name: str) -> bool:
        """Requests to an adapter are expected: brings it near, ahead of them.

        Its bytes come to DRAM on the nodes that have its base, on all if none has; where a replica
        is ready they also come into its pages, if there is room that no sequence wants. Returns at
        once; what goes wrong is told to the first request.

        Args:
            name: NAME, or BASE:NAME as its arrivals are counted under.

        Returns:
            False if there is no such adapter, or no longer.
        """
        base, colon, own = name.rpartition(":")
        adapter = self._adapters.get(own)
        if adapter is None or (colon and adapter.spec.base != base):
            return False
        for node in self._nodes_of(adapter.spec.base):
            node.prefetch_adapter(adapter.adapter_id, into_pages=True)
        return True

    def ended(self, adapter: RegisteredAdapter) -> None:
        """A request that began with this version has ended, or its first trial."""
        self._users[adapter.adapter_id] -= 1
        self._retire_unused(adapter.adapter_id)

    def count(self, name: str, num_tokens: int) -> None:
        """A request to the model or adapter of that name has ended, after so many tokens."""
        now = time.monotonic()
        use = self.uses.setdefault(name, Use(now))
        use.num_requests += 1
        use.num_tokens += num_tokens
        use.last_at = now

    def num_users(self, adapter_id: AdapterId) -> int:
        return self._users[adapter_id]

    async def _add(
        self, model: DeployedModel, name: str, source: str, check: SelfCheck, *, replace: bool
    ) -> RegisteredAdapter:
        known = self._adapters.get(name)
        facts = await self._runtime.nodes[0].describe_adapter(source, model.spec)
        if known is not None:
            same = (known.spec.base, known.spec.source, known.spec.identity)
            if same == (model.spec.model_id, source, facts.identity):
                return known
            self._check_replaceable(known, model, source, replace=replace)
        spec = AdapterSpec(
            name=name,
            version=await self._catalogue.take_adapter_version(name),
            base=model.spec.model_id,
            source=source,
            size_bytes=facts.size_bytes,
            identity=facts.identity,
        )
        adapter = RegisteredAdapter(
            spec, facts.rank, facts.num_parameters, facts.targets, time.time()
        )
        await self._take_on(model, adapter, check)
        if known is not None:
            self._retire_unused(known.adapter_id)
        return adapter

    async def _take_on(
        self, model: DeployedModel, adapter: RegisteredAdapter, check: SelfCheck
    ) -> None:
        """Nobody can ask for the version before it has answered once and is durable."""
        self._declare(adapter)
        self._users[adapter.adapter_id] += 1
        try:
            await check(model, adapter)
            async with self._deployments.keeping(model):
                await self._catalogue.put_adapter(adapter)
                self._put(adapter)
        finally:
            self.ended(adapter)

    def _check_replaceable(
        self, known: RegisteredAdapter, model: DeployedModel, source: str, *, replace: bool
    ) -> None:
        if known.spec.base != model.spec.model_id:
            raise ConflictError(
                f"{known.name} is an adapter of {known.spec.base}: remove it first, or take "
                "another name"
            )
        if not replace:
            what = (
                f"the files of {source} have changed since {known.name} was added"
                if known.spec.source == source
                else f"{known.name} comes from {known.spec.source}"
            )
            raise ConflictError(f"{what}; replace it, or remove it first")

    def _turn(self, name: str) -> asyncio.Lock:
        """Who holds it may change what has that name."""
        return self._turns.setdefault(name, asyncio.Lock())

    def _nodes_of(self, base: ModelId) -> list[Node]:
        """Those that have the base, or all: any may get it."""
        nodes = self._runtime.nodes
        having = self._runtime.controller.nodes_of(base)
        return [node for node in nodes if node.spec.node_id in having] or list(nodes)

    def _put(self, adapter: RegisteredAdapter) -> None:
        self._adapters[adapter.name] = adapter
        self._names.put(adapter.name, KIND)

    def _declare(self, adapter: RegisteredAdapter) -> None:
        for node in self._runtime.nodes:
            node.declare_adapter(adapter.spec)

    def _retire_unused(self, adapter_id: AdapterId) -> None:
        """Nodes forget a version that nobody can ask for and nobody uses any more."""
        current = self._adapters.get(adapter_id.rpartition("@")[0])
        if self._users[adapter_id] > 0 or (current and current.adapter_id == adapter_id):
            return
        del self._users[adapter_id]
        for node in self._runtime.nodes:
            node.retire_adapter(adapter_id)
