"""Adapters in the service: added, asked for, replaced, removed, restored, on a scripted node."""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path

import pytest
from tests.integration.live.fake_node import FakeNode
from tests.integration.live.test_service import M, Rig, play, request, serving, text_of

from flashserve.errors import (
    CheckpointError,
    ConflictError,
    ForbiddenError,
    InputError,
    InternalError,
    ModelNotFoundError,
    UnavailableError,
)
from flashserve.messages.commands import StartReplica
from flashserve.types import AdapterId, ModelId, Tier

pytestmark = pytest.mark.integration


async def add(rig: Rig, name: str = "shout", source: str = "/loras/shout", **options: bool) -> None:
    await rig.service.add_adapter(M, name, source, **{"trusted": True, **options})


def test_an_added_adapter_answers_under_its_name_and_under_its_bases(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        for asked in ("shout", f"{M}:shout"):
            generation, chunks = await rig.generate(model_id=asked)
            assert text_of(chunks) == "hello world"
            assert generation.receipt.model_id == M
            assert generation.receipt.adapter == "shout@1"
        jobs = rig.node.jobs[1:]
        assert [(job.adapter_id, job.salt) for job in jobs] == [("shout@1", "shout@1")] * 2

        base, _ = await rig.generate()
        assert base.receipt.adapter is None
        assert (rig.node.jobs[-1].adapter_id, rig.node.jobs[-1].salt) == (None, "")

    play(tmp_path, scenario)


def test_adding_asks_the_adapter_for_one_token_which_counts_for_nothing(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        (job,) = rig.node.jobs
        assert (job.adapter_id, job.params.max_tokens) == ("shout@1", 1)
        (status,) = await rig.service.adapters()
        assert (status.requests, status.tokens, status.in_flight) == (0, 0, 0)
        assert status.last_used_s is None

    play(tmp_path, scenario)


def test_an_adapter_that_does_not_answer_is_not_registered(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.stream_error = InternalError("not a number")
        with pytest.raises(InternalError, match="shout did not answer its first request: not a nu"):
            await add(rig)
        assert await rig.service.adapters() == []
        assert rig.node.adapters == {}
        with pytest.raises(ModelNotFoundError):
            await rig.generate(model_id="shout")
        rig.node.stream_error = None
        await add(rig)
        assert list(rig.node.adapters) == ["shout@2"]

    play(tmp_path, scenario)


def test_an_adapter_that_cannot_be_served_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.describe_error = CheckpointError("adapter_config.json is missing")
        with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
            await add(rig)
        assert rig.node.adapters == {}
        assert rig.node.jobs == []

    play(tmp_path, scenario)


def test_the_same_content_again_changes_nothing(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        await add(rig)
        assert list(rig.node.adapters) == ["shout@1"]
        assert len(rig.node.jobs) == 1

    play(tmp_path, scenario)


def test_other_content_or_another_source_needs_replace(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        with pytest.raises(ConflictError, match="comes from /loras/shout; replace it"):
            await add(rig, source="/loras/other")
        rig.node.adapter_facts = dataclasses.replace(rig.node.adapter_facts, identity="adapter-2")
        with pytest.raises(ConflictError, match="have changed since shout was added"):
            await add(rig)
        assert list(rig.node.adapters) == ["shout@1"]
        await add(rig, replace=True)
        assert list(rig.node.adapters) == ["shout@2"]

    play(tmp_path, scenario)


def test_a_replaced_version_finishes_what_it_began(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        rig.node.slow_adapter = AdapterId("shout@1")
        old = await rig.service.submit(request(model_id="shout"))
        rig.node.adapter_facts = dataclasses.replace(rig.node.adapter_facts, identity="adapter-2")
        await add(rig, replace=True)
        assert set(rig.node.adapters) == {"shout@1", "shout@2"}
        new, _ = await rig.generate(model_id="shout")
        assert new.receipt.adapter == "shout@2"
        rig.node.hurry.set()
        assert text_of([chunk async for chunk in old]) == "hello world"
        assert old.receipt.adapter == "shout@1"
        await rig.eventually(lambda: set(rig.node.adapters) == {"shout@2"})

    play(tmp_path, scenario)


def test_a_request_that_loses_its_replica_goes_on_with_the_version_it_began_with(
    tmp_path: Path,
) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        rig.node.running.clear()
        generation = await rig.service.submit(request(model_id="shout"))
        await rig.eventually(lambda: len(rig.node.jobs) == 2)
        await rig.service.remove_adapter("shout")
        assert list(rig.node.adapters) == ["shout@1"]
        rig.node.lose(M)
        rig.node.running.set()
        assert text_of([chunk async for chunk in generation]) == "hello world"
        assert [job.adapter_id for job in rig.node.jobs] == ["shout@1"] * 3
        assert generation.receipt.resumed == 1
        await rig.eventually(lambda: rig.node.adapters == {})

    play(tmp_path, scenario)


def test_removal_while_in_use_lets_streams_finish_and_refuses_new_requests(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        rig.node.running.clear()
        generation = await rig.service.submit(request(model_id="shout"))
        await rig.service.remove_adapter("shout")
        with pytest.raises(ModelNotFoundError, match="shout is not deployed"):
            await rig.service.submit(request(model_id="shout"))
        rig.node.running.set()
        assert text_of([chunk async for chunk in generation]) == "hello world"

    play(tmp_path, scenario)


def test_an_adapter_of_a_cold_base_starts_it(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        assert rig.node.commands == []
        await add(rig)
        assert [type(command) for command in rig.node.commands] == [StartReplica]
        generation, _ = await rig.generate(model_id="shout")
        assert generation.receipt.adapter == "shout@1"

    play(tmp_path, scenario)


def test_a_base_that_is_deleted_meanwhile_gets_no_adapter(tmp_path: Path) -> None:
    """Whether it goes before the adapter has answered, or just when it is written down."""

    async def scenario(rig: Rig) -> None:
        rig.node.running.clear()
        adding = asyncio.create_task(add(rig))
        await rig.eventually(lambda: len(rig.node.jobs) == 1)
        await rig.service.delete(M)
        rig.node.running.set()
        with pytest.raises(ModelNotFoundError, match="tiny is not deployed"):
            await adding
        assert await rig.service.adapters() == []
        await rig.eventually(lambda: rig.node.adapters == {})

        await rig.deploy()
        both = await asyncio.gather(add(rig), rig.service.delete(M), return_exceptions=True)
        assert sum(isinstance(one, Exception) for one in both) == 1
        kept = {status.base for status in await rig.service.adapters()}
        assert kept <= {status.name for status in await rig.service.models()}

    play(tmp_path, scenario)


def test_two_replacements_at_once_come_one_after_the_other(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        await asyncio.gather(
            add(rig, source="/loras/a", replace=True), add(rig, source="/loras/b", replace=True)
        )
        (status,) = await rig.service.adapters()
        assert (status.version, status.source) == (3, "/loras/b")
        assert list(rig.node.adapters) == ["shout@3"]

    play(tmp_path, scenario)


def test_models_and_adapters_cannot_share_a_name(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        with pytest.raises(ConflictError, match=f"{M} is the name of a model"):
            await add(rig, name=M)
        with pytest.raises(ConflictError, match="shout is the name of an adapter"):
            await rig.deploy("shout")
        await rig.deploy("other")
        with pytest.raises(ConflictError, match="shout is an adapter of tiny: remove it first"):
            await rig.service.add_adapter("other", "shout", "/loras/shout", trusted=True)

    play(tmp_path, scenario)


def test_a_name_that_is_being_taken_is_not_given_twice(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        both = await asyncio.gather(
            add(rig, name="both"), rig.deploy("both"), return_exceptions=True
        )
        assert [type(one) for one in both].count(ConflictError) == 1

    play(tmp_path, scenario)


def test_a_model_with_adapters_keeps_its_weights(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        with pytest.raises(ConflictError, match=r"cannot be deleted while it has adapters \(shout"):
            await rig.service.delete(M)
        rig.node.facts = dataclasses.replace(rig.node.facts, identity="id-2")
        with pytest.raises(ConflictError, match="cannot be replaced while it has adapters"):
            await rig.deploy(replace=True)
        await rig.service.remove_adapter("shout")
        await rig.deploy(replace=True)
        await rig.service.delete(M)

    play(tmp_path, scenario)


def test_an_unknown_adapter_is_answered_with_close_names(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        with pytest.raises(ModelNotFoundError, match="did you mean shout"):
            await rig.generate(model_id="shouts")
        with pytest.raises(ModelNotFoundError, match=f"model {M} has no adapter sh; it has: shout"):
            await rig.generate(model_id=f"{M}:sh")
        with pytest.raises(ModelNotFoundError):
            await rig.generate(model_id="nothing:shout")
        for number in range(30):
            await add(rig, name=f"many{number}")
        with pytest.raises(ModelNotFoundError, match=r"did you mean shout\?.*it has: .* 11 more"):
            await rig.generate(model_id=f"{M}:shoud")
        with pytest.raises(ConflictError, match=r"many0, .* and 23 more\): remove"):
            await rig.service.delete(M)
        with pytest.raises(ModelNotFoundError, match="did you mean shout"):
            await rig.service.remove_adapter("shot")

    play(tmp_path, scenario)


def test_an_adapter_needs_a_base_a_name_and_a_source_that_may_be_used(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        with pytest.raises(ModelNotFoundError, match="model none is not deployed"):
            await rig.service.add_adapter("none", "shout", "/loras/shout", trusted=True)
        for name in ("", "a:b", "x" * 129):
            with pytest.raises(InputError, match="adapter name"):
                await add(rig, name=name)
        with pytest.raises(ForbiddenError):
            await add(rig, trusted=False)

    play(tmp_path, scenario)


def test_adapters_come_back_after_a_restart_with_versions_that_go_on(tmp_path: Path) -> None:
    async def before(rig: Rig) -> None:
        await add(rig)
        await add(rig, name="gone")
        await rig.service.remove_adapter("gone")

    play(tmp_path, before)

    async def after() -> None:
        async with serving(tmp_path, FakeNode()) as rig:
            assert list(rig.node.adapters) == ["shout@1"]
            generation, _ = await rig.generate(model_id="shout")
            assert generation.receipt.adapter == "shout@1"
            await add(rig, name="gone")
            assert "gone@2" in rig.node.adapters

    asyncio.run(after())


def test_a_queued_request_has_its_adapter_brought_near_before_it_is_dispatched(
    tmp_path: Path,
) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        rig.node.prefetched.clear()
        rig.node.lose(M)
        rig.node.obeys = False
        generation = await rig.service.submit(request(model_id="shout"))
        assert rig.node.prefetched == [AdapterId("shout@1")]
        assert len(rig.node.jobs) == 1
        await generation.aclose()

    play(tmp_path, scenario)


def test_an_expected_adapter_is_brought_near_without_a_request(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        assert rig.node.expected == []
        for name in ("shout", f"{M}:shout"):
            assert rig.service.prefetch_adapter(name)
        assert rig.node.expected == [AdapterId("shout@1")] * 2
        for name in ("", "shot", "other:shout", f"{M}:", M):
            assert not rig.service.prefetch_adapter(name)
        rig.node.adapter_facts = dataclasses.replace(rig.node.adapter_facts, identity="adapter-2")
        await add(rig, replace=True)
        assert rig.service.prefetch_adapter("shout")
        await rig.service.remove_adapter("shout")
        assert not rig.service.prefetch_adapter("shout")
        assert rig.node.expected == [*[AdapterId("shout@1")] * 2, AdapterId("shout@2")]
        assert len(rig.node.jobs) == 2

    play(tmp_path, scenario)


def test_a_base_that_cannot_start_leaves_nothing_registered(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        rig.node.start_error = UnavailableError("no memory for it")
        with pytest.raises(UnavailableError, match="did not answer its first request"):
            await add(rig)
        assert rig.node.adapters == {}
        assert await rig.service.adapters() == []

    play(tmp_path, scenario, failure_backoff_s=60.0, deadline_s=0.3)


def test_the_list_shows_use_place_and_advice(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        await rig.generate(model_id="shout")
        await rig.generate()
        (status,) = await rig.service.adapters()
        assert (status.name, status.base, status.version) == ("shout", M, 1)
        assert (status.requests, status.tokens) == (1, 12)
        assert (status.tier, status.dram_bytes) == (Tier.DRAM, 1 << 16)
        assert status.targets == ("q_proj", "v_proj")
        assert status.advice == "multiplex"
        assert "seen for 0 of 10 minutes" in status.reason

    play(tmp_path, scenario)


def test_arrivals_of_an_adapter_are_counted_beside_its_bases(tmp_path: Path) -> None:
    async def scenario(rig: Rig) -> None:
        await add(rig)
        await rig.generate(model_id="shout")
        await rig.generate()
        recorder = rig.service.demand._recorder
        counts = {count.series: count.count for count in recorder._counter.drain()}
        assert counts == {M: 2, ModelId(f"{M}:shout"): 1}

    play(tmp_path, scenario)
