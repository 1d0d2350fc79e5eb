"""What can be tested of the CUDA side without a device: its calls, and its refusals."""

import ctypes
import enum
import importlib
import types

import pytest
import torch
from tests.unit.store.device.fake_device import FakeArena

from flashserve.errors import InternalError, UnavailableError
from flashserve.store.device.copier import CpuCopier, CudaCopier
from flashserve.store.device.cudart import Cudart
from flashserve.store.device.loadplan import Copy
from flashserve.store.device.vmm import VirtualMemory


def test_the_processors_copies_are_contiguous_and_strided():
    arena, copier = FakeArena(1000), CpuCopier()
    region = copier.reserve(100)
    region.map()
    rows = Copy(100, 20, 8, num_rows=3, pitch_bytes=50)
    copier.copy(arena.address, region, [Copy(7, 0, 20), rows])
    wanted = arena.bytes[7:27].tolist() + [
        value for begin in (100, 150, 200) for value in arena.bytes[begin : begin + 8].tolist()
    ]
    assert region.bytes[:44].tolist() == wanted
    assert region.bytes[44:].sum() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_machine_without_cuda_is_told():
    with pytest.raises(UnavailableError, match="no CUDA device"):
        CudaCopier(torch.device("cuda"))


class FakeCudart:
    """The library's functions, which record their calls. codes: what each returns."""

    def __init__(self, read_only: bool = True, **codes: int) -> None:
        self.calls: list[tuple[object, ...]] = []
        for name in (
            "cudaHostRegister",
            "cudaHostUnregister",
            "cudaMemcpyAsync",
            "cudaMemcpy2DAsync",
            "cudaGetLastError",
        ):
            setattr(self, name, self._function(name, codes.get(name, 0)))

        def attribute(value, number, device):
            self.calls.append(("cudaDeviceGetAttribute", number, device))
            ctypes.cast(value, ctypes.POINTER(ctypes.c_int))[0] = int(read_only)
            return 0

        self.cudaDeviceGetAttribute = attribute
        self.cudaGetErrorString = lambda _: b"out of memory"
        self.cudaGetErrorString.argtypes = ()

    def _function(self, name: str, code: int):
        def call(*arguments: object) -> int:
            self.calls.append((name, *arguments))
            return code

        return call


def loaded(monkeypatch: pytest.MonkeyPatch, library: FakeCudart) -> Cudart:
    monkeypatch.setattr(ctypes, "CDLL", lambda _: library)
    return Cudart(1)


@pytest.mark.parametrize(("read_only", "flags"), [(True, 9), (False, 1)])
def test_the_arena_is_registered_read_only_where_the_device_can(monkeypatch, read_only, flags):
    library = FakeCudart(read_only)
    cudart = loaded(monkeypatch, library)
    cudart.register(4096, 100)
    assert cudart.registers_read_only == read_only
    assert library.calls == [
        ("cudaDeviceGetAttribute", 113, 1),
        ("cudaHostRegister", 4096, 100, flags),
    ]


def test_a_refused_registration_clears_the_error(monkeypatch):
    library = FakeCudart(cudaHostRegister=2)
    cudart = loaded(monkeypatch, library)
    with pytest.raises(UnavailableError, match="100 bytes of host memory: out of memory"):
        cudart.register(4096, 100)
    assert library.calls[-1] == ("cudaGetLastError",)


def test_copies_name_the_stream_and_the_pitch(monkeypatch):
    library = FakeCudart()
    cudart = loaded(monkeypatch, library)
    cudart.copy(1, 2, 3, 77)
    cudart.copy_rows(1, 2, 50, 8, 3, 77)
    assert library.calls[1:] == [
        ("cudaMemcpyAsync", 1, 2, 3, 1, 77),
        ("cudaMemcpy2DAsync", 1, 8, 2, 50, 8, 3, 1, 77),
    ]


def test_a_failed_copy_is_named(monkeypatch):
    cudart = loaded(monkeypatch, FakeCudart(cudaMemcpyAsync=700))
    with pytest.raises(InternalError, match="cudaMemcpyAsync failed: out of memory"):
        cudart.copy(1, 2, 3, 0)


class Result(enum.IntEnum):
    SUCCESS = 0
    OUT_OF_MEMORY = 2


class FakeDriver:
    """cuda.bindings.driver's calls that virtual memory needs; `failing` calls fail."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.failing: set[str] = set()
        self.mapped: dict[int, int] = {}
        self.handles = 0
        self.CUmemAllocationProp = lambda: types.SimpleNamespace(location=types.SimpleNamespace())
        self.CUmemAccessDesc = types.SimpleNamespace
        constants = types.SimpleNamespace(
            CU_MEM_ALLOCATION_TYPE_PINNED=1,
            CU_MEM_LOCATION_TYPE_DEVICE=1,
            CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3,
            CU_MEM_ALLOC_GRANULARITY_RECOMMENDED=1,
        )
        self.CUmemAllocationType = self.CUmemLocationType = constants
        self.CUmemAccess_flags = self.CUmemAllocationGranularity_flags = constants

    def _answer(self, name: str, *values: object) -> tuple[object, ...]:
        self.calls.append(name)
        if name in self.failing:
            return (Result.OUT_OF_MEMORY, *(None for _ in values))
        return (Result.SUCCESS, *values)

    def cuCtxGetCurrent(self):  # noqa: N802
        return self._answer("cuCtxGetCurrent", 1)

    def cuMemGetAllocationGranularity(self, _prop, _option):  # noqa: N802
        return self._answer("cuMemGetAllocationGranularity", 4096)

    def cuMemAddressReserve(self, size, alignment, _hint, _flags):  # noqa: N802
        assert size % alignment == 0
        return self._answer("cuMemAddressReserve", 1 << 20)

    def cuMemCreate(self, _size, _prop, _flags):  # noqa: N802
        answer = self._answer("cuMemCreate", "handle")
        self.handles += answer[0] is Result.SUCCESS
        return answer

    def cuMemMap(self, address, size, _offset, _handle, _flags):  # noqa: N802
        answer = self._answer("cuMemMap")
        if answer[0] is Result.SUCCESS:
            self.mapped[address] = size
        return answer

    def cuMemSetAccess(self, _address, _size, descriptions, count):  # noqa: N802
        assert len(descriptions) == count
        return self._answer("cuMemSetAccess")

    def cuMemUnmap(self, address, size):  # noqa: N802
        assert self.mapped.pop(address) == size
        return self._answer("cuMemUnmap")

    def cuMemRelease(self, _handle):  # noqa: N802
        self.handles -= 1
        return self._answer("cuMemRelease")

    def cuMemAddressFree(self, _address, _size):  # noqa: N802
        return self._answer("cuMemAddressFree")


@pytest.fixture
def driver(monkeypatch) -> FakeDriver:
    fake = FakeDriver()
    monkeypatch.setattr(importlib, "import_module", lambda _: fake)
    return fake


def test_a_virtual_region_gives_its_memory_back_and_keeps_its_address(driver):
    region = VirtualMemory(torch.device("cpu")).reserve(5000)
    region.map()
    assert (driver.mapped, driver.handles) == ({1 << 20: 8192}, 1)
    region.unmap()
    region.map()
    assert driver.calls.count("cuMemAddressReserve") == 1
    assert driver.mapped == {1 << 20: 8192}
    region.free()
    region.free()
    assert (driver.mapped, driver.handles) == ({}, 0)
    assert driver.calls.count("cuMemAddressFree") == 1


@pytest.mark.parametrize("failing", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_virtual_memory_that_fails_half_way_leaves_nothing(driver, failing):
    region = VirtualMemory(torch.device("cpu")).reserve(5000)
    driver.failing = {failing}
    with pytest.raises((UnavailableError, InternalError), match=failing):
        region.map()
    assert (driver.mapped, driver.handles) == ({}, 0)
    driver.failing = set()
    region.map()
    assert driver.handles == 1


def test_virtual_memory_needs_its_bindings(monkeypatch):
    def missing(name: str):
        raise ImportError(f"no module {name}")

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UnavailableError, match=r"no module cuda\.bindings\.driver"):
        VirtualMemory(torch.device("cpu"))
