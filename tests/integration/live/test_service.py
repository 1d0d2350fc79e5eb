"""The service over the real controller, runtime and catalogue, and a node that plays a script."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from tests.integration.live.fake_node import START, FakeNode
from tests.unit.live.tiny import write_text

from flashserve.config import PolicySettings, Settings
from flashserve.errors import (
    CatalogueError,
    ChatTemplateError,
    CheckpointError,
    ConflictError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    FlashServeError,
    ForbiddenError,
    InputError,
    InternalError,
    ModelNotFoundError,
    QueueFullError,
    ReplicaError,
    SourceError,
    UnavailableError,
    UnsupportedModelError,
)
from flashserve.live.generation import Generation
from flashserve.live.launcher import launch
from flashserve.live.requests import GenerationRequest, TextChunk
from flashserve.live.service import Service
from flashserve.messages.commands import Evict, Stage, StartReplica, StopReplica
from flashserve.policy.schedules import Bounds
from flashserve.types import ModelId, SamplingParams, Tier

pytestmark = pytest.mark.integration
M = ModelId("tiny")


class Rig:
    def __init__(self, service: Service, node: FakeNode, checkpoint: Path) -> None:
        self.service, self.node, self.checkpoint = service, node, checkpoint

    async def deploy(self, name: str = M, **options: Any) -> None:
        await self.service.deploy(name, str(self.checkpoint), trusted=True, **options)

    async def generate(self, **fields: Any) -> tuple[Generation, list[TextChunk]]:
        generation = await self.service.submit(request(**fields))
        return generation, [chunk async for chunk in generation]

    async def eventually(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not is_so():  # noqa: ASYNC110 - a test looks from outside
                await asyncio.sleep(0.001)


def request(**fields: Any) -> GenerationRequest:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    params = {name: fields.pop(name) for name in list(fields) if name in names}
    fields = {"model_id": M, "prompt": "hi", **fields}
    if "messages" in fields:
        del fields["prompt"]
    return GenerationRequest(params=SamplingParams(**{"max_tokens": 100, **params}), **fields)


async def read_until_error(generation: Generation, chunks: list[TextChunk]) -> None:
    async for chunk in generation:
        chunks.append(chunk)  # noqa: PERF401 - what came before the error counts


def text_of(chunks: list[TextChunk], choice: int = 0) -> str:
    return "".join(chunk.text for chunk in chunks if chunk.choice == choice)


@contextlib.asynccontextmanager
async def serving(
    tmp_path: Path, node: FakeNode | None = None, **policy: Any
) -> AsyncIterator[Rig]:
    node = node or FakeNode()
    settings = Settings(data_dir=tmp_path / "data", policy=PolicySettings(**policy))
    checkpoint = tmp_path / "checkpoint"
    write_text(checkpoint, chat=True)
    async with launch(settings, [node]) as service:
        rig = Rig(service, node, checkpoint)
        await rig.eventually(lambda: service.is_ready)
        yield rig
    assert node.num_open_streams == 0


def play(
    tmp_path: Path,
    scenario: Callable[[Rig], Awaitable[None]],
    node: FakeNode | None = None,
    *,
    deployed: bool = True,
    **policy: Any,
) -> None:
    async def run() -> None:
        async with serving(tmp_path, node, **policy) as rig:
            if deployed:
                await rig.deploy()
            await scenario(rig)

    asyncio.run(run())


# Generation


def test_a_cold_model_is_started_and_answers_with_a_receipt(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation, chunks = await rig.generate()
        assert text_of(chunks) == "hello world"
        assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["stop"]
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (2, 12)
        receipt = generation.receipt
        assert (receipt.model_id, receipt.tier, receipt.cold) == (M, Tier.DISK, True)
        assert generation.predicted.startup_s > 0
        assert receipt.actual.startup_s <= START.startup_s
        assert receipt.ttft_s is not None
        assert receipt.total_s is not None
        assert receipt.gateway_in_s is not None
        assert 0 < receipt.actual.total_s <= receipt.ttft_s <= receipt.total_s

        warm, _ = await rig.generate()
        assert (warm.receipt.tier, warm.receipt.cold) == (Tier.DEVICE, False)
        assert len(rig.node.commands) == 1

    play(tmp_path, scenario)


def test_chat_goes_through_the_template(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate(messages=({"role": "user", "content": "ab"},))
        assert rig.node.jobs[0].prompt_ids[0] == 256
        assert len(rig.node.jobs[0].prompt_ids) == 3

    play(tmp_path, scenario)


def test_prompt_ids_go_to_the_engine_as_they_are(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate(prompt=None, prompt_ids=(5, 6, 7), reuse_prefix=False)
        assert rig.node.jobs[0].prompt_ids == (5, 6, 7)
        assert not rig.node.jobs[0].reuse_prefix

    play(tmp_path, scenario)


def test_a_stop_string_aborts_the_sequence_and_counts_up_to_its_last_token(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation, chunks = await rig.generate(stop=("o w",))
        assert text_of(chunks) == "hell"
        assert chunks[-1].finish_reason == "stop"
        assert generation.usage.completion_tokens == len("hello w")
        assert rig.node.num_open_streams == 0

    play(tmp_path, scenario)


def test_several_choices_run_side_by_side_and_the_prompt_counts_once(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation, chunks = await rig.generate(num_choices=3, seed=7, max_tokens=5, logprobs=0)
        assert [text_of(chunks, choice) for choice in range(3)] == ["hello"] * 3
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"] * 3
        assert (generation.usage.prompt_tokens, generation.usage.completion_tokens) == (2, 15)
        assert [job.params.seed for job in rig.node.jobs] == [7, 8, 9]
        assert all(chunk.logprobs for chunk in chunks)

    play(tmp_path, scenario)


def test_what_the_cache_had_of_a_prompt_is_in_the_usage(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        assert (await rig.generate())[0].usage.cached_tokens == 0
        rig.node.num_reused = 1
        generation = await rig.service.submit(request())
        await anext(generation)
        rig.node.num_reused = 50  # the replica that goes on has the emitted tokens, too
        rig.node.lose(M)
        async for _ in generation:
            pass
        assert generation.receipt.resumed == 1
        assert generation.usage.cached_tokens == 1
        assert (await rig.generate())[0].usage.cached_tokens == 2

    play(tmp_path, scenario)


def test_chat_without_a_limit_may_fill_the_context(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate(max_tokens_given=False)
        assert rig.node.jobs[0].params.max_tokens == 510

    play(tmp_path, scenario)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_a_lost_replica_is_not_seen_by_the_client(tmp_path: Path, num_choices: int) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.answer = "grüße aus der ferne"
        generation = await rig.service.submit(request(num_choices=num_choices, stop=("rne",)))
        chunks: list[TextChunk] = []
        async for chunk in generation:
            chunks.append(chunk)
            if len(chunks) in {3, 9}:
                rig.node.lose(M)
        for choice in range(num_choices):
            assert text_of(chunks, choice) == "grüße aus der fe"
        num_tokens = len("grüße aus der ferne".encode())
        assert generation.usage.completion_tokens == num_choices * num_tokens
        assert generation.receipt.resumed == 2
        assert sum(chunk.num_tokens for chunk in chunks) == num_choices * num_tokens
        again = rig.node.jobs[-1]
        assert again.prompt_ids == rig.node.jobs[0].prompt_ids
        assert again.emitted_ids
        await rig.eventually(lambda: rig.service.model(M).in_flight == 0)

    play(tmp_path, scenario)


def test_a_request_that_loses_too_many_replicas_is_given_up_with_what_it_has(
    tmp_path: Path,
) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request())
        chunks = [await anext(generation)]
        rig.node.lose(M)
        chunks.append(await anext(generation))
        rig.node.lose(M)
        with pytest.raises(ReplicaError, match="lost 2 replicas"):
            await read_until_error(generation, chunks)
        assert "hello world".startswith(text_of(chunks))
        assert [chunk async for chunk in generation] == []

    play(tmp_path, scenario, max_attempts=2)


def test_closing_a_generation_aborts_its_sequences_and_frees_the_replica(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request(num_choices=2))
        await anext(generation)
        rig.node.running.clear()
        await rig.eventually(lambda: rig.node.num_open_streams == 2)
        assert rig.service.model(M).in_flight == 1
        await generation.aclose()
        await generation.aclose()
        assert rig.node.num_open_streams == 0
        await rig.eventually(lambda: rig.service.model(M).in_flight == 0)

    play(tmp_path, scenario)


def test_a_client_that_leaves_before_admission_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        task = asyncio.create_task(rig.service.submit(request()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await rig.eventually(lambda: rig.service.model(M).in_flight == 0)
        assert rig.service.model(M).waiting == 0

    play(tmp_path, scenario)


def test_a_slow_reader_gets_everything(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.facts = dataclasses.replace(rig.node.facts, context_tokens=10_000)
        await rig.deploy("long")
        rig.node.answer = "x" * 3000
        generation = await rig.service.submit(request(model_id="long", max_tokens=5000))
        for _ in range(2000):
            await asyncio.sleep(0)
        chunks = [chunk async for chunk in generation]
        assert text_of(chunks) == rig.node.answer

    play(tmp_path, scenario)


@pytest.mark.parametrize("num_choices", [1, 2])
def test_an_engine_that_refuses_is_an_error_and_not_a_lost_replica(
    tmp_path: Path, num_choices: int
) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.stream_error = InputError("token id 9999 is not in the vocabulary")
        with pytest.raises(InputError, match="not in the vocabulary"):
            await rig.generate(num_choices=num_choices)
        rig.node.stream_error = None
        assert text_of((await rig.generate())[1]) == "hello world"

    play(tmp_path, scenario)


# What is refused


def test_requests_that_cannot_be_served_are_refused_before_anything_runs(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        (rig.checkpoint / "chat_template.jinja").write_text("{{ raise_exception('no system') }}")
        await rig.deploy("strict")
        (rig.checkpoint / "chat_template.jinja").unlink()
        rig.node.facts = dataclasses.replace(rig.node.facts, identity="id-2")
        await rig.deploy("plain")
        chat = ({"role": "user", "content": "x"},)
        refused: list[tuple[type[FlashServeError], str, dict[str, Any]]] = [
            (
                ModelNotFoundError,
                "none is not deployed; deployed: plain, strict, tiny",
                {"model_id": "none"},
            ),
            (ContextLengthError, "600 tokens.*512", {"prompt": "x" * 600}),
            (ContextLengthError, "500 tokens.*20.*512", {"prompt": "x" * 500, "max_tokens": 20}),
            (InputError, "empty", {"prompt": ""}),
            (InputError, "no system", {"model_id": "strict", "messages": chat}),
            (
                ChatTemplateError,
                "plain has no chat template",
                {"model_id": "plain", "messages": chat},
            ),
        ]
        for error, words, fields in refused:
            with pytest.raises(error, match=words):
                await rig.service.submit(request(**fields))
        assert rig.node.commands == []

    play(tmp_path, scenario)


def test_a_full_queue_says_when_to_come_back(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        first = await rig.service.submit(request())
        with pytest.raises(QueueFullError) as caught:
            await rig.service.submit(request())
        assert caught.value.retry_after_s is not None
        await first.aclose()

    play(tmp_path, scenario, FakeNode(obeys=False), queue_limit=1)


def test_a_request_that_waited_too_long_is_told_why(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request(deadline_s=0.02))
        with pytest.raises(DeadlineError):
            await anext(generation)

    play(tmp_path, scenario, FakeNode(obeys=False))


def test_a_model_that_cannot_start_says_why_to_everyone_who_waits(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.start_error = CheckpointError("model.safetensors: the header is damaged")
        with pytest.raises(CheckpointError, match=r"model\.safetensors: the header is damaged"):
            await rig.generate()
        assert rig.service.model(M).state == "failed"

    play(tmp_path, scenario)


# Deploying


def test_what_was_deployed_is_there_after_a_restart_and_still_answers(tmp_path: Path) -> None:
    async def first(rig: Rig) -> None:
        await rig.deploy("a/b", keep_alive_s=7.0)
        await rig.deploy("gone")
        await rig.service.delete("gone")
        await rig.generate()
        rig.node.running.clear()

    async def second(rig: Rig) -> None:
        models = await rig.service.models()
        assert [(one.name, one.state, one.tier) for one in models] == [
            ("a/b", "cold", Tier.DISK),
            ("tiny", "cold", Tier.DISK),
        ]
        assert [one.keep_alive_s for one in models] == [7.0, 300.0]
        assert text_of((await rig.generate())[1]) == "hello world"

    play(tmp_path, first)
    play(tmp_path, second, deployed=False)


def test_a_source_that_vanished_does_not_stop_the_server(tmp_path: Path) -> None:
    play(tmp_path, lambda rig: rig.deploy("other"))

    async def run() -> None:
        node = FakeNode()
        settings = Settings(data_dir=tmp_path / "data")
        (tmp_path / "moved").mkdir()
        (tmp_path / "checkpoint").rename(tmp_path / "moved" / "checkpoint")
        async with launch(settings, [node]) as service:
            rig = Rig(service, node, tmp_path / "checkpoint")
            with pytest.raises(SourceError, match="checkpoint is not there any more"):
                await service.submit(request(model_id="other"))
            assert service.model_names() == ["other", "tiny"]
            (tmp_path / "moved" / "checkpoint").rename(tmp_path / "checkpoint")
            assert text_of((await rig.generate(model_id="other"))[1]) == "hello world"

    asyncio.run(run())


def test_a_deployment_that_fails_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.describe_error = UnsupportedModelError("attention sinks are not served")
        with pytest.raises(UnsupportedModelError):
            await rig.deploy("bad")
        rig.node.describe_error = None
        (rig.checkpoint / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
            await rig.deploy("bad")
        assert rig.service.model_names() == []

    play(tmp_path, scenario, deployed=False)


def test_minimums_that_cannot_be_met_together_are_refused(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.deploy("a", bounds=Bounds(min_replicas=1))
        with pytest.raises(InputError, match="and a 1 for others") as refused:
            await rig.deploy("b", bounds=Bounds(min_replicas=1))
        assert refused.value.param == "min_replicas"
        await rig.deploy("a", bounds=Bounds(min_replicas=1))  # it does not count twice
        assert rig.service.model_names() == ["a"]

    play(tmp_path, scenario, deployed=False)


def test_names_and_times_are_checked(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        for name in ("", "a b", "x" * 129, "ü", "a\n"):
            with pytest.raises(InputError, match="model name"):
                await rig.deploy(name)
        for keep_alive_s in (-1.0, float("nan"), float("inf")):
            with pytest.raises(InputError, match="keep_alive_s"):
                await rig.deploy("x", keep_alive_s=keep_alive_s)

    play(tmp_path, scenario, deployed=False)


def test_bounds_are_kept_and_shown_as_they_hold_now(tmp_path: Path) -> None:
    always = ("daily 00:00-24:00 max=3", "mon-sun 00:00-24:00 target=2")

    async def first(rig: Rig) -> None:
        await rig.deploy("a", bounds=Bounds(0, 1, 8, always))
        await rig.deploy("b", bounds=Bounds(min_replicas=1))

    async def second(rig: Rig) -> None:
        a, b = rig.service.model("a"), rig.service.model("b")
        assert (a.min_replicas, a.max_replicas, a.target, a.schedule) == (0, 3, 2, always)
        assert (b.min_replicas, b.max_replicas, b.target, b.schedule) == (1, None, None, ())
        await rig.deploy("a")
        a = rig.service.model("a")
        assert (a.min_replicas, a.max_replicas, a.target, a.schedule) == (0, None, None, ())

    play(tmp_path, first, deployed=False)
    play(tmp_path, second, deployed=False)


def test_bounds_that_cannot_be_met_are_refused_with_the_field(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        for bounds, field in [
            (Bounds(2, 1), "min_replicas"),
            (Bounds(min_replicas=2), "min_replicas"),
            (Bounds(schedule=("mon 00:00-01:00 min=2",)), "schedule"),
        ]:
            with pytest.raises(InputError) as refused:
                await rig.deploy("x", bounds=bounds)
            assert refused.value.param == field
        assert rig.service.model_names() == []

    play(tmp_path, scenario, deployed=False)


def test_savings_are_counted_and_outlive_the_server(tmp_path: Path) -> None:
    async def first(rig: Rig) -> None:
        await rig.generate(tenant="acme")
        report = await rig.service.savings.report(1)
        assert (report.total.requests, report.total.cold) == (1, 1)
        assert [line.name for line in report.tenants] == ["acme"]
        assert [other.policy for other in report.against] == ["always-on", "keep-alive-10m"]

    async def second(rig: Rig) -> None:
        await rig.generate(tenant="labs")
        report = await rig.service.savings.report(1)
        assert report.total.requests == 2
        assert {line.name for line in report.tenants} == {"acme", "labs"}
        assert report.total.busy_s > 0

    play(tmp_path, first)
    play(tmp_path, second, deployed=False)


def test_what_the_policy_did_and_why_is_shown(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.deploy(bounds=Bounds(min_replicas=1))
        await rig.eventually(lambda: rig.service.model(M).state == "ready")
        (start,) = rig.service.decisions(1)
        assert start.action == "StartReplica"
        assert start.reason == rig.service.model(M).reason
        assert start.reason.startswith("min_replicas 1; ")
        assert "predicted" in start.reason
        status = rig.service.model(M)
        assert (status.wanted_replicas, status.plan) == (1, "always on")

    play(tmp_path, scenario, deployed=False, name="always-on")


def test_a_shadow_reports_what_it_would_have_done(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate()
        report = await rig.service.savings.report(1)
        assert report.policy == "keep-alive-1m"
        assert "histogram" in {other.policy for other in report.against}
        assert rig.service.settings.policy.shadow == "histogram"

    play(tmp_path, scenario, name="keep-alive-1m", shadow="histogram")


@pytest.mark.parametrize("setting", ["name", "shadow"])
def test_an_unknown_policy_is_refused_with_those_that_there_are(
    tmp_path: Path, setting: str
) -> None:
    async def scenario(_: Rig) -> None:
        raise AssertionError

    with pytest.raises(InputError, match=rf"^setting policy\.{setting}: .*always-on"):
        play(tmp_path, scenario, **{setting: "clairvoyant"})
    with pytest.raises(InputError, match="oracle"):
        play(tmp_path, scenario, **{setting: "oracle"})


def test_a_source_from_afar_must_be_allowed(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises(ForbiddenError):
            await rig.service.deploy("x", str(rig.checkpoint), trusted=False)

    play(tmp_path, scenario, deployed=False)


def test_a_name_keeps_its_source_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        created_at = rig.service.model(M).created_at
        await rig.deploy(keep_alive_s=9.0)
        assert rig.service.model(M).keep_alive_s == 9.0
        await rig.generate()

        other = tmp_path / "other"
        write_text(other)
        with pytest.raises(ConflictError, match=r"is deployed from .*checkpoint"):
            await rig.service.deploy(M, str(other), trusted=True)
        status = await rig.service.deploy(M, str(other), trusted=True, replace=True)
        assert (status.source, status.created_at) == (str(other), created_at)
        await rig.eventually(lambda: rig.service.model(M).state == "cold")

    play(tmp_path, scenario)


def test_files_that_changed_in_place_are_another_model(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate()
        rig.node.facts = dataclasses.replace(rig.node.facts, identity="id-2")
        with pytest.raises(ConflictError, match="have changed"):
            await rig.deploy()
        await rig.deploy(replace=True)
        await rig.eventually(lambda: isinstance(rig.node.commands[-1], Evict))
        await rig.generate()
        assert [type(one) for one in rig.node.commands] == [
            StartReplica,
            StopReplica,
            Evict,
            StartReplica,
        ]

    play(tmp_path, scenario)


def test_a_deleted_model_is_not_found_and_leaves_the_node(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate()
        await rig.service.delete(M)
        with pytest.raises(ModelNotFoundError):
            await rig.service.submit(request())
        with pytest.raises(ModelNotFoundError):
            await rig.service.delete(M)
        assert [type(one) for one in rig.node.commands[1:]] == [StopReplica, Evict]

    play(tmp_path, scenario)


def test_a_deleted_model_finishes_what_it_streams(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request())
        first = await anext(generation)
        rig.node.running.clear()
        await rig.service.delete(M)
        rig.node.running.set()
        chunks = [first] + [chunk async for chunk in generation]
        assert text_of(chunks) == "hello world"

    play(tmp_path, scenario)


# Tiers and views


def test_staging_and_evicting_wait_for_the_node(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        staged = await rig.service.stage(M, Tier.DRAM)
        assert (staged.tier, staged.dram_bytes) == (Tier.DRAM, 2 << 20)
        assert (await rig.service.stage(M, Tier.DRAM)).tier is Tier.DRAM
        evicted = await rig.service.evict(M, Tier.DRAM)
        assert (evicted.tier, evicted.dram_bytes) == (Tier.DISK, 0)
        assert (await rig.service.evict(M, Tier.DRAM)).tier is Tier.DISK
        kinds = {type(one) for one in rig.node.commands}
        assert kinds == {Stage, Evict}

    play(tmp_path, scenario)


def test_staging_that_fails_says_why(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.stage_error = SourceError("the directory has gone")
        with pytest.raises(SourceError, match="the directory has gone"):
            await rig.service.stage(M, Tier.DRAM)
        rig.node.stage_error = UnavailableError("no room")
        with pytest.raises(UnavailableError, match="no room"):
            await rig.service.stage(M, Tier.DRAM)
        with pytest.raises(ModelNotFoundError):
            await rig.service.stage("none", Tier.DRAM)

    play(tmp_path, scenario)


def test_evicting_waits_for_running_streams(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request())
        first = await anext(generation)
        rig.node.running.clear()
        eviction = asyncio.create_task(rig.service.evict(M, Tier.DRAM))
        await rig.eventually(lambda: rig.service.model(M).state == "draining")
        assert not eviction.done()
        rig.node.running.set()
        assert text_of([first] + [chunk async for chunk in generation]) == "hello world"
        assert (await eviction).tier is Tier.DISK

    play(tmp_path, scenario)


def test_a_model_deleted_while_it_is_staged_ends_the_wait(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.obeys = False
        for act in (rig.service.stage, rig.service.evict):
            waiting = asyncio.create_task(act(M, Tier.DRAM))
            await asyncio.sleep(0.01)
            await rig.service.delete(M)
            with pytest.raises(ModelNotFoundError, match="deleted meanwhile"):
                await waiting
            await rig.deploy()

    play(tmp_path, scenario)


def test_a_status_says_what_the_node_and_the_controller_know(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        assert rig.service.model(M).last_used_s is None
        await rig.generate()
        (status,) = await rig.service.models()
        assert (status.state, status.tier, status.replicas) == ("ready", Tier.DEVICE, 1)
        assert status.last_used_s is not None
        assert status.kv is not None
        assert (status.kv.total, status.kv.used) == (10, 4)
        assert (status.dram_bytes, status.size_bytes) == (2 << 20, 1 << 20)
        assert (status.architecture, status.context_tokens) == ("TinyForCausalLM", 512)
        actions = [decision.action for decision in rig.service.decisions()]
        assert actions == ["StartReplica"]
        with pytest.raises(ModelNotFoundError, match="none is not deployed; deployed: tiny"):
            rig.service.model("none")

    play(tmp_path, scenario)


def test_scale_to_zero_and_back(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await rig.generate()
        await rig.eventually(lambda: rig.service.model(M).state == "cold")
        generation, chunks = await rig.generate()
        assert text_of(chunks) == "hello world"
        assert (generation.receipt.tier, generation.receipt.cold) == (Tier.DRAM, True)

    play(tmp_path, scenario, keep_alive_s=0)


# The end


def test_draining_lets_streams_finish_and_takes_nothing_new(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request())
        await anext(generation)
        rig.node.running.clear()
        draining = asyncio.create_task(rig.service.drain(30.0))
        await asyncio.sleep(0)
        assert rig.service.draining
        assert not rig.service.is_ready
        with pytest.raises(DrainingError):
            await rig.service.submit(request())
        rig.node.running.set()
        rest = [chunk async for chunk in generation]
        assert rest[-1].finish_reason == "stop"
        await draining

    play(tmp_path, scenario)


def test_what_outlasts_the_grace_period_gets_an_error_after_its_text(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        generation = await rig.service.submit(request())
        first = await anext(generation)
        rig.node.running.clear()
        await rig.service.drain(0.01)
        chunks = [first]
        with pytest.raises(DrainingError, match="shut down before"):
            await read_until_error(generation, chunks)
        assert "hello world".startswith(text_of(chunks))

    play(tmp_path, scenario)


def test_arrivals_are_on_disk_after_the_end(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        for _ in range(3):
            await rig.generate()

    play(tmp_path, scenario)

    async def read(rig: Rig) -> None:
        rows = await rig.service.demand._recorder._catalogue.arrivals(M, 0, 1 << 40)
        assert sum(row.count for row in rows) == 3

    play(tmp_path, read, deployed=False)


def test_two_servers_do_not_share_a_data_directory(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises(ConflictError, match=r"process \d+"):
            async with launch(rig.service.settings, [FakeNode()]):
                pass

    play(tmp_path, scenario)


def test_a_damaged_catalogue_stops_the_start_with_the_remedy(tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    (data_dir / "catalogue.sqlite").write_bytes(b"junk" * 1000)
    with pytest.raises(CatalogueError, match="move it away"):
        play(tmp_path, lambda rig: rig.deploy(), deployed=False)


def test_a_fault_of_the_controller_makes_the_server_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Rig) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError

        with monkeypatch.context() as patch:
            patch.setattr(rig.service._runtime.controller, "handle", broken)
            with pytest.raises(InternalError, match="controller failed"):
                await rig.service.submit(request())
        assert not rig.service.is_ready
        assert text_of((await rig.generate())[1]) == "hello world"

    play(tmp_path, scenario)
