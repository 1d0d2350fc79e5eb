from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from flashserve.engine.lora.pages import PagePool, Rows

# Rows of SmolLM2's targets in pages of 192: in and out of q, k, v, o and of gate, up, down.
_QV = [(3, 3), (3, 1)]
_ALL = [(3, 3), (3, 1), (3, 1), (3, 3), (3, 8), (3, 8), (8, 3)]


def wanted(rank: int, targets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    return [(rank, width) for pair in targets for width in pair]


def pages_of(rows: list[Rows]) -> list[int]:
    return [
        page for item in rows for start in item.starts for page in range(start, start + item.width)
    ]


def test_rows_of_one_adapter_are_neighbours_where_there_is_room() -> None:
    pool = PagePool(100)
    rows = pool.allocate([(4, 3), (4, 1)])
    assert rows == [Rows(3, (0, 3, 6, 9)), Rows(1, (12, 13, 14, 15))]
    assert (pool.num_used, pool.num_free) == (16, 84)


def test_rows_fill_gaps_and_none_is_split() -> None:
    pool = PagePool(10)
    first, second, third, fourth = (pool.allocate([(1, width)]) for width in (3, 2, 3, 2))
    assert first is not None
    assert third is not None
    assert second != fourth
    pool.release(first)
    pool.release(third)
    assert pool.allocate([(1, 4)]) is None  # six are free, but three and three
    assert pool.num_free == 6
    rows = pool.allocate([(2, 1), (1, 3), (1, 1)])
    assert rows is not None
    assert sorted(pages_of(rows)) == [0, 1, 2, 5, 6, 7]
    assert rows[1] == Rows(3, (0,))


def test_what_does_not_fit_takes_nothing() -> None:
    pool = PagePool(8)
    assert pool.allocate([(2, 3), (1, 3)]) is None
    assert pool.num_free == 8
    assert pool.allocate([]) == []


@given(
    st.integers(0, 80),
    st.lists(
        st.one_of(
            st.lists(st.tuples(st.integers(0, 6), st.integers(1, 8)), max_size=4),
            st.integers(0, 20),
        ),
        max_size=40,
    ),
)
def test_every_page_has_one_owner_or_none(
    num_pages: int, calls: list[list[tuple[int, int]] | int]
) -> None:
    pool = PagePool(num_pages)
    held: list[list[Rows]] = []
    for call in calls:
        if isinstance(call, int):
            if held:
                pool.release(held.pop(call % len(held)))
        else:
            found = pool.allocate(call)
            if found is not None:
                assert [(len(rows.starts), rows.width) for rows in found] == call
                held.append(found)
            else:
                assert sum(count * width for count, width in call) > 0
        taken = pages_of([rows for item in held for rows in item])
        assert len(set(taken)) == len(taken)
        assert all(0 <= page < num_pages for page in taken)
        assert pool.num_used == len(taken)
        assert pool.num_used + pool.num_free == num_pages
    for item in held:
        pool.release(item)
    assert pool.num_free == num_pages
    if num_pages:
        assert pool.allocate([(1, num_pages)]) == [Rows(num_pages, (0,))]


def test_mixed_ranks_and_targets_fill_the_memory_again_and_again() -> None:
    draw = random.Random(0)
    pool = PagePool(23301)  # 256 MiB of SmolLM2
    held: list[list[Rows]] = []
    for _ in range(8):
        refused = 0
        while refused < 10:
            rank = draw.choice([4, 8, 16, 32, 64])
            found = pool.allocate(wanted(rank, draw.choice([_QV, _ALL])))
            if found is None:
                refused += 1
            else:
                held.append(found)
        assert pool.num_used > 0.9 * pool.num_pages
        # What fits by its number of pages fits, whatever was freed where.
        smallest = wanted(4, _ALL)
        if pool.num_free >= 2 * sum(count * width for count, width in smallest):
            found = pool.allocate(smallest)
            assert found is not None
            held.append(found)
        draw.shuffle(held)
        for _ in range(draw.randrange(1, len(held))):
            pool.release(held.pop())
