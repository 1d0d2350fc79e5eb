"""Models and adapters take room of their own, and adapters are packed closely."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.errors import InputError, ModelTooLargeError, UnavailableError
from flashserve.store.dram.arena import Arena, Extent, ExtentState

MIB = 1 << 20
KIB = 1 << 10


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(8 * MIB, packed_bytes=2 * MIB)
    yield arena
    arena.close()


def test_models_and_adapters_have_room_of_their_own(arena: Arena) -> None:
    assert (arena.usage().total, arena.packed.usage().total) == (6 * MIB, 2 * MIB)
    arena.allocate(6 * MIB)
    with pytest.raises(UnavailableError):
        arena.allocate(1)
    assert arena.packed.allocate(1).offset == 6 * MIB
    assert arena.packed.usage().used == 64 * KIB


def test_small_adapters_are_packed(arena: Arena) -> None:
    extents = [arena.packed.allocate(100 * KIB) for _ in range(16)]
    assert {extent.num_bytes for extent in extents} == {128 * KIB}
    assert arena.packed.usage().free == 0
    with pytest.raises(UnavailableError):
        arena.packed.allocate(1)


def test_an_adapter_larger_than_its_zone_names_the_setting(arena: Arena) -> None:
    with pytest.raises(ModelTooLargeError, match=r"node\.adapter_bytes"):
        arena.packed.allocate(2 * MIB + 1)
    with pytest.raises(ModelTooLargeError, match=r"node\.dram_bytes"):
        arena.allocate(6 * MIB + 1)


def test_without_room_for_adapters_there_is_no_adapter() -> None:
    arena = Arena(2 * MIB)
    with pytest.raises(ModelTooLargeError, match=r"node\.adapter_bytes"):
        arena.packed.allocate(1)
    arena.close()


def test_adapters_may_not_take_all() -> None:
    with pytest.raises(InputError, match="for models"):
        Arena(4 * MIB, packed_bytes=4 * MIB)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 700 * KIB)), max_size=30))
def test_used_and_free_are_all_and_bytes_survive_being_moved(steps: list[tuple[int, int]]) -> None:
    arena = Arena(4 * MIB, packed_bytes=2 * MIB)
    zone, held = arena.packed, dict[int, tuple[Extent, int]]()
    for step, (slot, size) in enumerate(steps):
        if slot in held:
            extent, mark = held.pop(slot)
            assert zone.memory(extent)[0] == zone.memory(extent)[-1] == mark
            zone.free(extent)
            assert extent.state is ExtentState.FREED
        elif zone.extent_bytes(size) <= zone.usage().free:  # nothing is leased: it always fits
            extent = zone.allocate(size)
            zone.memory(extent)[0] = zone.memory(extent)[-1] = step
            zone.seal(extent)
            held[slot] = extent, step
        usage = zone.usage()
        assert usage.used + usage.free == usage.total == 2 * MIB
        assert usage.used == sum(extent.num_bytes for extent, _ in held.values())
    arena.close()
