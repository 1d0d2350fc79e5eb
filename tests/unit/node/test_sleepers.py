import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flashserve.node.sleepers import Sleepers, kept_bytes
from flashserve.types import ModelId


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 60), st.booleans()), max_size=40)
)
def test_whatever_comes_and_goes_the_bounds_hold_and_each_is_closed_once(turns):
    closed: list[object] = []
    sleepers: Sleepers[object] = Sleepers(closed.append, max_asleep=3, max_bytes=100)
    sizes: dict[str, int] = {}
    made: list[object] = []
    popped = []
    for key, num_bytes, wakes in turns:
        if found := sleepers.pop(key):
            popped.append(found)
        if not wakes:
            made.append(object())
            sleepers.put(key, made[-1], ModelId(key), num_bytes)
            sizes[key] = num_bytes
            assert sleepers.keys[-1] == key
        assert len(sleepers.keys) <= 3
        assert sum(sizes[key] for key in sleepers.keys) <= 100
        assert sleepers.model_ids == sleepers.keys
    sleepers.clear()
    assert sorted(map(id, [*closed, *popped])) == sorted(map(id, made))


def test_the_longest_asleep_goes_first_and_one_that_is_too_large_at_once():
    closed: list[str] = []
    sleepers: Sleepers[str] = Sleepers(closed.append, max_asleep=2, max_bytes=100)
    for key in "abc":
        sleepers.put(key, key, ModelId(key), 10)
    assert closed == ["a"]
    sleepers.put("huge", "huge", ModelId("huge"), 101)
    assert (closed, sleepers.keys) == (["a", "huge"], ("b", "c"))
    assert sleepers.pop("a") is None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_a_model_keeps_is_its_objects_and_its_buffers_not_its_weights(device):
    with torch.device(device):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(1000))
    without = kept_bytes(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    assert kept_bytes(model) - without == (2 * 4000 + 8 if device == "cpu" else 0)
