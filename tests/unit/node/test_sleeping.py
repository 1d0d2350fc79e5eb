"""A model's life on a device whose copies are done only when somebody waits for them."""

import contextlib
import itertools
import math

import pytest
import torch
import transformers
from tests.unit.store.device.fake_device import FakeArena, FakeDevice
from tests.unit.store.device.test_bind import CONFIGS, SIZES, Mapped, save, skeleton

from flashserve.errors import (
    CheckpointError,
    FlashServeError,
    InternalError,
    UnavailableError,
    UnsupportedModelError,
)
from flashserve.node.sleeping import Residence, ResidenceState
from flashserve.store.checkpoint.order import groups
from flashserve.store.device.bind import TORCH_DTYPES, bind
from flashserve.store.device.copier import CpuCopier
from flashserve.store.device.regions import RegisteredArena
from flashserve.store.device.slices import cut
from flashserve.types import TensorSlice

torch.set_num_threads(1)

PIECE_BYTES = 5000
DTYPES = ["BF16", "F16", "F32", "F8_E4M3", "F8_E5M2", "I8", "I64", "BOOL"]


def tensors_in(arena: FakeArena, begin: int = 3) -> tuple[TensorSlice, ...]:
    """One tensor of each type at odd offsets, the first of several rows."""
    found, offset = [], begin
    for index, dtype in enumerate(DTYPES):
        shape = (20 + index, 30) if index % 2 else (41,)
        size = math.prod(shape) * TORCH_DTYPES[dtype].itemsize
        found.append(TensorSlice(dtype, dtype, shape, offset, size))
        offset += size + index % 3
    assert offset <= arena.num_bytes
    return tuple(found)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.fixture
def arena() -> FakeArena:
    return FakeArena(40_000)


NAMES = (tuple(DTYPES[:3]), (), tuple(DTYPES[3:]))


def test_the_device_holds_the_arenas_bytes_once_they_are_waited_for(arena):
    device, tensors = FakeDevice(), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes, piece_bytes=PIECE_BYTES)
    residence = Residence(device, registered, tensors, NAMES)
    residence.load()
    views = residence.views()
    assert as_bytes(views["BF16"]) != arena.read(tensors[0])  # the copy is only under way
    residence.wait(0)
    assert [as_bytes(views[each.name]) for each in tensors[:3]] == [*map(arena.read, tensors[:3])]
    assert as_bytes(views["I64"]) != arena.read(tensors[6])
    residence.finish()
    for tensor in tensors:
        view = views[tensor.name]
        assert as_bytes(view) == arena.read(tensor)
        assert (view.dtype, tuple(view.shape)) == (TORCH_DTYPES[tensor.dtype], tensor.shape)
        assert view.data_ptr() % 16 == residence.views()["BF16"].data_ptr() % 16


def test_groups_are_copied_as_they_open_and_no_sooner(arena):
    device, tensors = FakeDevice(), tensors_in(arena)
    residence = Residence(device, RegisteredArena(device, arena.address, 40_000), tensors, NAMES)
    assert device.copies == []
    residence.open(1)
    after_one = len(device.copies)
    residence.open(1)
    assert 0 < after_one == len(device.copies)
    with pytest.raises(InternalError, match="group 1 of the weights"):
        residence.wait(1)
    residence.open(3)
    residence.wait(2)
    assert as_bytes(residence.views()["BOOL"]) == arena.read(tensors[-1])


def test_a_rank_holds_its_part_alone(arena):
    device = FakeDevice()
    matrix = TensorSlice("w", "BF16", (50, 40), 1001, 4000)
    registered = RegisteredArena(device, arena.address, arena.num_bytes, piece_bytes=1500)
    part = cut(matrix, 1, 10, 20)
    residence = Residence(device, registered, [matrix], [["w"]], parts={"w": part})
    residence.load()
    residence.finish()
    stored = torch.frombuffer(bytearray(arena.read(matrix)), dtype=torch.bfloat16).view(50, 40)
    assert as_bytes(residence.views()["w"]) == as_bytes(stored[:, 10:20])
    assert residence.num_bytes < 2000
    assert sum(copy.num_bytes for copy in device.copies) == 1000


def test_floats_of_another_type_are_converted_on_the_way(arena):
    device = FakeDevice()
    values = torch.randn(64)
    arena.bytes[100:356] = values.view(torch.uint8).numpy()
    tensors = [TensorSlice("a", "F32", (64,), 100, 256), TensorSlice("b", "F32", (64,), 100, 256)]
    registered = RegisteredArena(device, arena.address, arena.num_bytes)
    residence = Residence(device, registered, tensors, [["a"], ["b"]], float_dtype="BF16")
    residence.load()
    residence.wait(1)
    for name in ("a", "b"):
        assert torch.equal(residence.views()[name], values.to(torch.bfloat16))


def test_sleep_frees_exactly_the_region_and_wake_restores_it_at_the_same_addresses(arena):
    device, tensors = FakeDevice(), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes, piece_bytes=PIECE_BYTES)
    residence = Residence(device, registered, tensors, NAMES)
    residence.load()
    views = residence.views()
    residence.finish()
    before = {name: (view.data_ptr(), as_bytes(view)) for name, view in views.items()}
    assert device.mapped_bytes == residence.num_bytes == residence.sleep()
    assert (device.mapped_bytes, len(device.regions)) == (0, 1)
    assert residence.state is ResidenceState.ASLEEP
    assert as_bytes(views["BF16"]) != before["BF16"][1]
    # Meanwhile the arena has moved the model.
    moved = tensors_in(arena, begin=4097)
    for old, new in reversed([*zip(tensors, moved, strict=True)]):
        arena.bytes[new.offset : new.offset + new.num_bytes] = list(before[old.name][1])
    residence.wake(moved)
    residence.load()
    residence.finish()
    assert residence.keeps_addresses
    assert {name: (view.data_ptr(), as_bytes(view)) for name, view in views.items()} == before


def test_where_addresses_cannot_be_kept_views_still_come_back(arena):
    device, tensors = FakeDevice(keeps_address=False), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes)
    residence = Residence(device, registered, tensors, NAMES)
    residence.load()
    views = residence.views()
    residence.sleep()
    assert device.mapped_bytes == 0
    residence.wake(tensors)
    residence.load()
    residence.finish()
    assert not residence.keeps_addresses
    assert {each.name: arena.read(each) for each in tensors} == {
        name: as_bytes(view) for name, view in views.items()
    }


@pytest.mark.parametrize(
    "fault", [{"reserve": 0}, {"map": 0}, {"copy": 0}, {"copy": 3}, {"convert": 0}, {"map": 1}]
)
def test_a_failure_half_way_leaves_nothing_allocated(arena, fault):
    device, tensors = FakeDevice(**fault), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes, piece_bytes=PIECE_BYTES)
    kind = next(iter(fault))
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.raises(FlashServeError, match=f"no {kind} today"))
        residence = Residence(device, registered, tensors, NAMES, float_dtype="F32")
        residence.load()
        residence.sleep()
        residence.wake(tensors)
    assert (device.regions, device.mapped_bytes, device.queue) == ([], 0, [])


def test_waking_with_other_tensors_is_refused_and_closes(arena):
    device, tensors = FakeDevice(), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes)
    residence = Residence(device, registered, tensors, NAMES)
    residence.sleep()
    with pytest.raises(CheckpointError, match="tensor BF16"):
        residence.wake(tensors[1:])
    assert residence.state is ResidenceState.CLOSED
    assert device.regions == []


def test_registration_that_fails_costs_speed_alone(arena):
    device, tensors = FakeDevice(register=2), tensors_in(arena)
    registered = RegisteredArena(device, arena.address, arena.num_bytes, piece_bytes=PIECE_BYTES)
    assert registered.refusal is not None
    residence = Residence(device, registered, tensors, NAMES)
    residence.load()
    residence.finish()
    views = residence.views()
    assert all(as_bytes(views[each.name]) == arena.read(each) for each in tensors)


@pytest.mark.parametrize("copier", [FakeDevice, CpuCopier])
@pytest.mark.parametrize("name", ["llama", "llama tied", "qwen2", "gemma2"])
@pytest.mark.parametrize("shard", ["50GB", "20KB"])
@pytest.mark.parametrize("start", [0, 3])
def test_a_model_on_the_device_computes_what_it_did(tmp_path, copier, name, shard, start):
    save(CONFIGS[name](), tmp_path / "whole", torch.bfloat16)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "whole").eval()
    expected.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    mapped = Mapped(tmp_path / "saved", start)
    device = copier()
    registered = RegisteredArena(device, mapped.address, mapped.num_bytes, piece_bytes=8192)
    model = skeleton(tmp_path / "saved")
    bind(model, mapped.tensors, mapped.mapping, None)
    names = groups(each.name for each in mapped.tensors)
    residence = Residence(device, registered, mapped.tensors, names)
    residence.bind(model)
    residence.load()
    residence.finish()
    assert not any(mapped.holds(parameter) for parameter in model.parameters())
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (
        expected.lm_head.weight is expected.get_input_embeddings().weight
    )
    ids = torch.arange(20)[None]
    with torch.no_grad():
        wanted = expected(ids).logits
        assert torch.equal(model(ids).logits, wanted)
        residence.sleep()
        residence.wake(mapped.tensors)
        residence.load()
        residence.finish()
        assert torch.equal(model(ids).logits, wanted)
    residence.close()


def test_a_parameter_without_a_place_is_named_and_nothing_stays(tmp_path):
    save(transformers.LlamaConfig(**SIZES), tmp_path)
    mapped, device = Mapped(tmp_path), FakeDevice()
    model = skeleton(tmp_path)
    bind(model, mapped.tensors, mapped.mapping, None)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    registered = RegisteredArena(device, mapped.address, mapped.num_bytes)
    names = groups(each.name for each in mapped.tensors)
    residence = Residence(device, registered, mapped.tensors, names)
    with pytest.raises(UnsupportedModelError, match="parameter extra"):
        residence.bind(model)
    assert device.regions == []


def test_a_full_device_says_so(arena):
    device = FakeDevice(map=0)
    registered = RegisteredArena(device, arena.address, arena.num_bytes)
    with pytest.raises(UnavailableError):
        Residence(device, registered, tensors_in(arena), NAMES)


def test_the_processors_region_loses_its_bytes_asleep_and_keeps_its_address(arena):
    copier, tensors = CpuCopier(), tensors_in(arena)
    registered = RegisteredArena(copier, arena.address, arena.num_bytes)
    residence = Residence(copier, registered, tensors, NAMES)
    residence.load()
    views = residence.views()
    addresses = [view.data_ptr() for view in views.values()]
    assert all(as_bytes(views[each.name]) == arena.read(each) for each in tensors)
    residence.sleep()
    assert not any(itertools.chain.from_iterable(map(as_bytes, views.values())))
    residence.wake(tensors)
    residence.load()
    assert [view.data_ptr() for view in residence.views().values()] == addresses
    assert all(as_bytes(views[each.name]) == arena.read(each) for each in tensors)
