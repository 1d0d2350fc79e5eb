"""From a trace of arrivals to models and requests, reproducible from a seed.

The mapping:
- Models: functions of the trace are drawn with replacement, in proportion to their weights, one
  for each model, so that the models' rates are distributed as the population's. A function that is
  drawn again is shifted in time, around the clock: by up to half an hour if it is diurnal, else by
  any whole number of minutes, so that copies do not come together.
- Sizes: each model's is drawn from `model_bytes`, all equally likely.
- Thinning: with `num_requests`, models with more arrivals than some number keep each of them with
  the chance that brings them down to it; the number is chosen so that the total is met on average.
  Rare models keep all theirs.
- Time: with `compression`, a minute of the trace takes 60 / compression seconds.
- Arrivals of a minute come at times drawn evenly within it.
- Lengths: each model is of one kind (a conversation, code), drawn in proportion to the requests of
  the kinds; each request takes prompt and answer together from one drawn request of its kind.
  Longer prompts than the context leaves room for are cut off at their beginning.
- Adapters: request k of a model with adapters uses one of them, drawn by a Zipf law; tenants and
  prefixes likewise. A prompt that is shorter than its prefix is a part of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import History
from flashserve.forecast.traces import DIURNAL, Trace
from flashserve.messages.events import Event, ModelDeployed, RequestArrived
from flashserve.sim.lengths import Lengths, published_lengths
from flashserve.sim.steps import Job
from flashserve.types import ModelId, ModelSpec, RequestId, Tier

Ints = npt.NDArray[np.int64]
Arrival = tuple[float, RequestArrived, Job]
_MINUTE_S = 60.0
_NEAR_MINUTES = 30
MAX_REQUESTS = 50_000_000


@dataclasses.dataclass(frozen=True, slots=True)
class WorkloadSettings:
    """num_models: drawn from the trace. num_requests: about so many; None keeps all.

    model_bytes: sizes of checkpoints. lowest_tier: DISK when every node has all of them in a
    directory, REMOTE when they must be fetched. adapter_share: of requests that use an adapter,
    where there are any. prefix_tokens: of a prompt that are equal for all requests with one prefix.
    zipf: exponent of the laws by which adapters, prefixes and tenants are drawn.
    """

    num_models: int = 100
    num_requests: int | None = None
    model_bytes: tuple[int, ...] = (14 * 10**9,)
    lowest_tier: Tier = Tier.DISK
    compression: float = 1.0
    context_tokens: int = 8192
    adapters_per_model: int = 0
    adapter_share: float = 1.0
    prefixes_per_model: int = 0
    prefix_tokens: int = 512
    num_tenants: int = 1
    zipf: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_models", "compression", "context_tokens", "num_tenants"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} is {getattr(self, name)}, not above 0")
        for name in ("adapters_per_model", "prefixes_per_model", "prefix_tokens", "zipf", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is {getattr(self, name)}, not 0 or more")
        if not 0 <= self.adapter_share <= 1:
            raise InputError(f"adapter_share is {self.adapter_share}, not between 0 and 1")
        if self.num_requests is not None and not 0 < self.num_requests <= MAX_REQUESTS:
            raise InputError(
                f"num_requests is {self.num_requests}, not between 1 and {MAX_REQUESTS}"
            )
        if not self.model_bytes or min(self.model_bytes) <= 0:
            raise InputError("model_bytes must name at least one size, each above 0")
        if self.context_tokens < 2:
            raise InputError(f"context_tokens is {self.context_tokens}, not 2 or more")


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """The requests of one slot, in order of arrival; all fields are [requests].

    model: index into Workload.models. adapter, prefix: a number within the model, -1 for none.
    """

    at: npt.NDArray[np.float64]
    model: Ints
    prompt_tokens: Ints
    output_tokens: Ints
    adapter: Ints
    prefix: Ints
    tenant: Ints


@dataclasses.dataclass(frozen=True, slots=True)
class Workload:
    """Models, and what arrives for them from time 0 on.

    counts: [models, slots], arrivals in each slot of slot_s seconds (a minute of the trace).
    cohorts: [models], the kind of each model's traffic, judged by its function's whole row.
    """

    settings: WorkloadSettings
    models: tuple[ModelSpec, ...]
    cohorts: tuple[str, ...]
    counts: npt.NDArray[np.int32]
    slot_s: float
    lengths: tuple[Lengths, ...]
    kinds: Ints
    """[models], index into lengths."""
    first_slot: int = 0
    """Of the trace; slots before it were cut off by `after`."""

    @property
    def num_requests(self) -> int:
        return int(self.counts.sum())

    @property
    def duration_s(self) -> float:
        return float(self.counts.shape[1] * self.slot_s)

    def deployments(self) -> Iterator[tuple[float, Event]]:
        """Every model, deployed at time 0."""
        for model in self.models:
            yield 0.0, ModelDeployed(model)

    def after(self, num_slots: int) -> tuple[History, Workload]:
        """What came in the first slots, as minute counts before time 0, and the workload after it.

        Raises:
            InputError: nothing is left after so many.
        """
        if not 0 < num_slots < self.counts.shape[1]:
            raise InputError(f"the workload has {self.counts.shape[1]} slots, not over {num_slots}")
        before = dataclasses.replace(self, counts=self.counts[:, :num_slots])
        rest = dataclasses.replace(
            self, counts=self.counts[:, num_slots:], first_slot=self.first_slot + num_slots
        )
        past = before.minute_counts()
        return dataclasses.replace(past, start=-past.counts.shape[1]), rest

    def minute_counts(self) -> History:
        """Arrivals in each simulated minute, as a forecaster sees them; minute 0 is time 0."""
        names = tuple(str(model.model_id) for model in self.models)
        num_slots = self.counts.shape[1]
        minutes = (np.arange(num_slots) * self.slot_s / _MINUTE_S + 1e-9).astype(np.int64)
        first = np.searchsorted(minutes, np.arange(int(minutes[-1]) + 1))
        if (np.diff(minutes) > 1).any():
            raise InputError("a workload slower than its trace has no minute counts")
        return History(names, 0, np.add.reduceat(self.counts, first, axis=1).astype(np.float32))

    def slices(self) -> Iterator[Slice]:
        """The requests, slot by slot; slots without any are left out."""
        for slot in range(self.counts.shape[1]):
            column = self.counts[:, slot]
            total = int(column.sum())
            if total:
                yield self._draw(slot, column, total)

    def arrivals(self) -> Iterator[Arrival]:
        """The requests, one by one; the row of each is its number."""
        ids = [model.model_id for model in self.models]
        number = 0
        for part in self.slices():
            columns = (
                part.at,
                part.model,
                part.prompt_tokens,
                part.output_tokens,
                part.adapter,
                part.prefix,
                part.tenant,
            )
            for at, model, prompt, output, adapter, prefix, tenant in zip(
                *(column.tolist() for column in columns), strict=True
            ):
                request_id = RequestId(f"r{number}")
                adapter_name = "" if adapter < 0 else f"a{adapter}"
                prefix_key = None if prefix < 0 else prefix
                yield (
                    at,
                    RequestArrived(
                        request_id,
                        ids[model],
                        prompt,
                        None,
                        adapter_name,
                        f"t{tenant}" if tenant else "",
                        prefix_key,
                    ),
                    Job(
                        request_id,
                        prompt,
                        output,
                        adapter_name,
                        prefix_key,
                        self.settings.prefix_tokens,
                        number,
                    ),
                )
                number += 1

    def _draw(self, slot: int, column: npt.NDArray[np.int32], total: int) -> Slice:
        settings = self.settings
        rng = np.random.default_rng([settings.seed, self.first_slot + slot, 1])
        model = np.repeat(np.arange(len(self.models)), column)
        at = (slot + rng.random(total)) * self.slot_s
        order = np.argsort(at, kind="stable")
        at, model = at[order], model[order]
        prompt, output = self._draw_lengths(rng, model)
        adapter = _zipf(rng, settings.adapters_per_model, settings.zipf, total)
        adapter[rng.random(total) >= settings.adapter_share] = -1
        prefix = _zipf(rng, settings.prefixes_per_model, settings.zipf, total)
        tenant = np.maximum(_zipf(rng, settings.num_tenants, settings.zipf, total), 0)
        return Slice(at, model, prompt, output, adapter, prefix, tenant)

    def _draw_lengths(self, rng: np.random.Generator, model: Ints) -> tuple[Ints, Ints]:
        prompt, output = np.empty(len(model), np.int64), np.empty(len(model), np.int64)
        kinds = self.kinds[model]
        for number, lengths in enumerate(self.lengths):
            chosen = np.flatnonzero(kinds == number)
            rows = rng.integers(len(lengths.prompt), size=len(chosen))
            prompt[chosen], output[chosen] = lengths.prompt[rows], lengths.output[rows]
        limit = self.settings.context_tokens
        output = np.clip(output, 1, limit // 2)
        return np.clip(prompt, 1, limit - output), output


def make_workload(
    trace: Trace,
    settings: WorkloadSettings | None = None,
    lengths: Sequence[Lengths] | None = None,
) -> Workload:
    """Models and requests from a trace; see above how.

    lengths: kinds of requests; the published statistics without any.

    Raises:
        InputError: the trace has nothing to draw from.
    """
    settings = settings or WorkloadSettings()
    lengths = tuple(lengths) if lengths else published_lengths(settings.seed)
    if trace.unit != "arrivals":
        raise InputError(f"the trace {trace.name} counts {trace.unit}, not arrivals")
    weights = np.where(np.isfinite(trace.weights) & (trace.weights > 0), trace.weights, 0.0)
    if not weights.sum():
        raise InputError(f"the trace {trace.name} has no series with a weight to draw models from")
    rng = np.random.default_rng([settings.seed, 0])
    drawn = rng.choice(len(weights), settings.num_models, p=weights / weights.sum())
    rows, cohorts = _rows(trace, drawn, rng)
    counts = _thin(rows, settings.num_requests, rng)
    if not counts.sum():
        raise InputError(f"the trace {trace.name} has no arrivals for the models drawn from it")
    sizes = rng.choice(np.array(settings.model_bytes), settings.num_models)
    shares = np.array([len(kind.prompt) for kind in lengths], dtype=float)
    kinds = rng.choice(len(lengths), settings.num_models, p=shares / shares.sum())
    models = tuple(
        ModelSpec(
            ModelId(f"m{number:05d}"), f"sim://m{number:05d}", int(size), settings.lowest_tier
        )
        for number, size in enumerate(sizes)
    )
    slot_s = _MINUTE_S / settings.compression
    return Workload(settings, models, cohorts, counts, slot_s, lengths, kinds.astype(np.int64))


def _rows(
    trace: Trace, drawn: Ints, rng: np.random.Generator
) -> tuple[npt.NDArray[np.float32], tuple[str, ...]]:
    """[models, minutes] of the drawn functions, copies shifted; and the cohort of each."""
    unique = np.unique(drawn)
    chosen = np.zeros(len(trace.weights), dtype=bool)
    chosen[unique] = True
    cohort_of = dict(zip(unique.tolist(), trace.select(chosen).cohorts(), strict=True))
    rows = np.nan_to_num(trace.history.counts[drawn])
    num_minutes = rows.shape[1]
    seen: set[int] = set()
    for number, source in enumerate(drawn.tolist()):
        near = min(_NEAR_MINUTES, num_minutes - 1)
        shift = int(
            rng.integers(-near, near + 1)
            if cohort_of[source] == DIURNAL
            else rng.integers(num_minutes)
        )
        if source in seen:
            rows[number] = np.roll(rows[number], shift)
        seen.add(source)
    return rows, tuple(cohort_of[source] for source in drawn.tolist())


def _thin(
    rows: npt.NDArray[np.float32], num_requests: int | None, rng: np.random.Generator
) -> npt.NDArray[np.int32]:
    """Whole counts, of about so many arrivals in all; see above which are left out."""
    counts = np.rint(rows).astype(np.int32)
    totals = counts.sum(axis=1, dtype=np.int64)
    if num_requests is None:
        if totals.sum() > MAX_REQUESTS:
            raise InputError(
                f"the workload has {totals.sum():,} requests: thin it (num_requests, --requests)"
            )
        return counts
    if totals.sum() <= num_requests:
        return counts
    cap = _cap(totals, num_requests)
    for number in np.flatnonzero(totals > cap):
        counts[number] = rng.binomial(counts[number], cap / totals[number])
    return counts


def _cap(totals: Ints, wanted: int) -> float:
    """The number c with sum(min(totals, c)) == wanted; wanted is less than the sum of all."""
    ordered = np.sort(totals)
    below = np.concatenate([[0], np.cumsum(ordered)[:-1]])
    num_above = np.arange(len(ordered), 0, -1)
    reached = below + ordered * num_above  # with c at each of them
    index = int(np.searchsorted(reached, wanted))
    return float((wanted - below[index]) / num_above[index])


def _zipf(rng: np.random.Generator, number: int, exponent: float, size: int) -> Ints:
    """Numbers below `number`, the smaller the more often; -1 without any."""
    if number <= 0:
        return np.full(size, -1, np.int64)
    if number == 1:
        return np.zeros(size, np.int64)
    shares = np.cumsum(1.0 / np.arange(1, number + 1) ** exponent)
    return np.searchsorted(shares / shares[-1], rng.random(size), side="right").astype(np.int64)
