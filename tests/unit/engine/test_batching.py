from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.engine.batching import Batcher
from flashserve.engine.blocks import BlockPool
from flashserve.engine.sequence import Segment, Sequence
from flashserve.messages.work import GenerateJob
from flashserve.types import SamplingParams


def make_sequence(
    name: str, num_prompt: int, max_tokens: int = 4, emitted: int = 0, first: int = 0
) -> Sequence:
    job = GenerateJob(
        sequence_id=name,
        prompt_ids=tuple(range(first, first + num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        emitted_ids=tuple(range(emitted)),
    )
    return Sequence.from_job(job, seed=0)


def make_batcher(num_blocks: int = 16, max_tokens: int = 16, **options: object) -> Batcher:
    return Batcher(BlockPool(num_blocks, 4), 4, max_tokens, **options)


def spans(segments: list[Segment]) -> list[tuple[str, int, int]]:
    return [(item.sequence.sequence_id, item.begin, item.end) for item in segments]


def advance(batcher: Batcher) -> list[tuple[str, int, int]]:
    """One step whose every sampling segment emits token 99."""
    segments = batcher.schedule()
    batcher.commit(segments)
    for segment in segments:
        if segment.samples:
            sequence = segment.sequence
            sequence.tokens.append(99)
            if sequence.num_emitted >= sequence.params.max_tokens:
                batcher.remove(sequence.sequence_id)
    return spans(segments)


def test_a_long_prompt_is_computed_in_chunks() -> None:
    batcher = make_batcher(max_tokens=8)
    batcher.add(make_sequence("a", 20))
    assert [advance(batcher) for _ in range(4)] == [
        [("a", 0, 8)],
        [("a", 8, 16)],
        [("a", 16, 20)],
        [("a", 20, 21)],
    ]


def test_decodes_go_before_prompts() -> None:
    batcher = make_batcher(max_tokens=8)
    batcher.add(make_sequence("long", 14))
    advance(batcher)
    batcher.add(make_sequence("short", 2))
    assert advance(batcher) == [("long", 8, 14), ("short", 0, 2)]
    batcher.add(make_sequence("next", 20, first=50))
    assert advance(batcher) == [("long", 14, 15), ("short", 2, 3), ("next", 0, 6)]


def test_only_so_many_run_at_a_time() -> None:
    batcher = make_batcher(max_tokens=64)
    for index in range(6):
        batcher.add(make_sequence(str(index), 2))
    assert len(advance(batcher)) == 4
    assert (batcher.num_running, batcher.num_waiting) == (4, 2)


def test_the_last_admitted_gives_way_when_blocks_run_out_and_comes_back_first() -> None:
    batcher = make_batcher(num_blocks=4, max_tokens=16, reuse_prefixes=False)
    old, young = make_sequence("old", 7, 8), make_sequence("young", 7, 8, first=50)
    waiting = make_sequence("waiting", 7, 8, first=70)
    batcher.add(old)
    batcher.add(young)
    advance(batcher)
    batcher.add(waiting)
    assert advance(batcher) == [("old", 7, 8), ("young", 7, 8)]
    assert advance(batcher) == [("old", 8, 9)]
    assert young.num_preemptions == 1
    assert young.blocks == []
    for _ in range(5):
        advance(batcher)
    assert advance(batcher) == [("young", 0, 9)]
    assert batcher.num_waiting == 1


def test_an_equal_prefix_is_not_computed_again() -> None:
    batcher = make_batcher()
    batcher.add(make_sequence("first", 10, 1))
    assert advance(batcher) == [("first", 0, 10)]
    second = make_sequence("second", 12, 1)
    batcher.add(second)
    assert advance(batcher) == [("second", 8, 12)]
    assert second.num_reused == 8


def test_whole_prompts_come_as_one_segment_and_replayed_tokens_one_by_one() -> None:
    batcher = make_batcher(max_tokens=8, whole_prompts=True, reuse_prefixes=False)
    batcher.add(make_sequence("a", 12, 8, emitted=3))
    batcher.add(make_sequence("b", 4, 8))
    assert advance(batcher) == [("a", 0, 12), ("a", 12, 13), ("a", 13, 14), ("a", 14, 15)]
    assert advance(batcher) == [("a", 15, 16), ("b", 0, 4)]


def test_removing_gives_all_blocks_back() -> None:
    pool = BlockPool(16, 4)
    batcher = Batcher(pool, 4, 8, reuse_prefixes=False)
    for index in range(6):
        batcher.add(make_sequence(str(index), 9))
    advance(batcher)
    for index in range(6):
        batcher.remove(str(index))
    assert pool.usage().free == 16
    assert batcher.schedule() == []


def check_segments(segments: list[Segment]) -> None:
    """They go on where their sequences are, in blocks that no other segment writes."""
    computed: dict[Sequence, int] = {}
    for item in segments:
        expected = computed.get(item.sequence, item.sequence.num_computed)
        assert item.begin == expected < item.end <= len(item.sequence.tokens)
        computed[item.sequence] = item.end
        assert len(item.sequence.blocks) * 4 >= item.end
    writers: set[int] = set()
    for sequence, end in computed.items():
        written = set(sequence.blocks[sequence.num_computed // 4 : -(-end // 4)])
        assert not written & writers
        writers |= written


@settings(max_examples=150, deadline=None)
@given(
    num_blocks=st.integers(4, 12),
    max_tokens=st.integers(1, 20),
    whole_prompts=st.booleans(),
    jobs=st.lists(st.tuples(st.integers(1, 10), st.integers(1, 7), st.integers(0, 3)), max_size=8),
    aborted=st.sets(st.integers(0, 7)),
)
def test_every_sequence_finishes_and_computes_each_position_once(
    num_blocks: int,
    max_tokens: int,
    whole_prompts: bool,
    jobs: list[tuple[int, int, int]],
    aborted: set[int],
) -> None:
    pool = BlockPool(num_blocks, 4)
    batcher = Batcher(
        pool, 3, max_tokens, reuse_prefixes=not whole_prompts, whole_prompts=whole_prompts
    )
    sequences = [
        make_sequence(str(index), num_prompt, num_new, first=100 * group)
        for index, (num_prompt, num_new, group) in enumerate(jobs)
    ]
    for sequence in sequences:
        batcher.add(sequence)
    for _ in range(600):
        segments = batcher.schedule()
        if not segments:
            break
        check_segments(segments)
        if not whole_prompts:
            assert sum(item.end - item.begin for item in segments) <= max_tokens
        batcher.commit(segments)
        usage = pool.usage()
        assert usage.used + usage.cached + usage.free == num_blocks
        for item in segments:
            if item.samples:
                item.sequence.tokens.append(len(item.sequence.tokens))
                if item.sequence.num_emitted >= item.sequence.params.max_tokens:
                    batcher.remove(item.sequence.sequence_id)
        for index in aborted:
            if str(index) in batcher and sequences[index].num_emitted:
                batcher.remove(str(index))
    else:
        raise AssertionError("the sequences do not finish")
    assert (batcher.num_running, batcher.num_waiting) == (0, 0)
    assert pool.usage().used == 0
    for index, sequence in enumerate(sequences):
        assert index in aborted or sequence.num_emitted == sequence.params.max_tokens
