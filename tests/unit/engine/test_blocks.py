from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.engine.blocks import BlockPool, chain_digest, root_digest
from flashserve.types import KVUsage


def make_digest(*tokens: int, salt: str = "") -> bytes:
    return chain_digest(root_digest(salt), tokens)


def test_a_lone_sequence_gets_neighbours() -> None:
    pool = BlockPool(8, 4)
    blocks = [pool.allocate()]
    while pool.num_available:
        blocks.append(pool.allocate(blocks[-1]))
    assert blocks == list(range(8))


def test_two_growing_sequences_do_not_get_in_each_others_way() -> None:
    pool = BlockPool(16, 4)
    first, second = [pool.allocate()], []
    second.append(pool.allocate())
    for _ in range(6):
        first.append(pool.allocate(first[-1]))
        second.append(pool.allocate(second[-1]))
    assert first == list(range(first[0], first[0] + 7))
    assert second == list(range(second[0], second[0] + 7))


def test_a_published_block_is_found_until_it_is_given_up() -> None:
    pool = BlockPool(2, 4)
    block = pool.allocate()
    pool.publish(block, make_digest(1, 2, 3, 4))
    pool.release([block])
    assert pool.usage() == KVUsage(total=2, used=0, cached=1, free=1)
    assert pool.find(make_digest(1, 2, 3, 4)) == block
    pool.share(block)
    assert pool.usage() == KVUsage(total=2, used=1, cached=0, free=1)
    pool.release([block])
    assert {pool.allocate(), pool.allocate()} == {0, 1}
    assert pool.find(make_digest(1, 2, 3, 4)) is None


def test_the_least_recently_used_prefix_goes_first_and_from_its_end() -> None:
    pool = BlockPool(4, 1)
    chains = {}
    for name in ("old", "new"):
        blocks = [pool.allocate() for _ in range(2)]
        for index, block in enumerate(blocks):
            pool.publish(block, make_digest(index, salt=name))
        pool.release(blocks)
        chains[name] = blocks
    assert [pool.allocate() for _ in range(3)] == [*reversed(chains["old"]), chains["new"][1]]


def test_equal_content_is_published_once() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(), pool.allocate()
    pool.publish(first, make_digest(1))
    pool.publish(second, make_digest(1))
    pool.release([first, second])
    assert pool.usage() == KVUsage(total=2, used=0, cached=1, free=1)


def test_dropping_the_cache_frees_what_nobody_holds() -> None:
    pool = BlockPool(3, 4)
    held, left = pool.allocate(), pool.allocate()
    pool.publish(held, make_digest(1))
    pool.publish(left, make_digest(2))
    pool.release([left])
    pool.drop_cached()
    assert pool.usage() == KVUsage(total=3, used=1, cached=0, free=2)
    assert pool.find(make_digest(1)) == held
    assert pool.find(make_digest(2)) is None


def test_digests_depend_on_salt_order_and_everything_before() -> None:
    start = make_digest(1, 2)
    digests = [
        start,
        make_digest(2, 1),
        make_digest(1, 2, salt="adapter"),
        chain_digest(start, (1, 2)),
        chain_digest(make_digest(2, 1), (1, 2)),
    ]
    assert len(set(digests)) == len(digests)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20))))
def test_blocks_are_conserved_and_have_one_writer(
    num_blocks: int, steps: list[tuple[int, int]]
) -> None:
    """Any order of allocate, release, publish, share and drop, against a plain model."""
    pool = BlockPool(num_blocks, 4)
    holders: list[list[int]] = []
    content: dict[int, int] = {}  # block -> the number it was published under
    for action, number in steps:
        if action == 0 and pool.num_available:
            held = holders[number % len(holders)] if holders and number % 2 else []
            if not held:
                holders.append(held)
            block = pool.allocate(held[-1] if held else None)
            assert all(block not in other for other in holders)
            content.pop(block, None)
            held.append(block)
        elif action == 1 and holders:
            pool.release(holders.pop(number % len(holders)))
        elif action == 2 and holders:
            block = holders[number % len(holders)][-1]
            pool.publish(block, make_digest(number))
            if pool.find(make_digest(number)) == block:
                content[block] = number
        elif action == 3 and (found := pool.find(make_digest(number))) is not None:
            assert content[found] == number
            pool.share(found)
            holders.append([found])
        elif action == 4:
            pool.drop_cached()
        references = Counter(block for held in holders for block in held)
        usage = pool.usage()
        assert usage.used + usage.cached + usage.free == usage.total == num_blocks
        assert usage.used == len(references)
        assert usage.free + usage.cached == pool.num_available
    for held in holders:
        pool.release(held)
    pool.drop_cached()
    assert pool.usage() == KVUsage(total=num_blocks, used=0, cached=0, free=num_blocks)
