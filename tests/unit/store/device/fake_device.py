"""A device whose copies are done only when somebody waits for them, and that refuses on demand."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import numpy as np
import torch

from flashserve.errors import InternalError, UnavailableError
from flashserve.store.device.loadplan import Copy
from flashserve.types import TensorSlice


class FakeRegion:
    def __init__(self, device: FakeDevice, num_bytes: int, keeps_address: bool) -> None:
        self.num_bytes = num_bytes
        self.keeps_address = keeps_address
        self.bytes = torch.full((num_bytes,), 0xEE, dtype=torch.uint8)
        self.is_mapped = False
        self._device = device

    def map(self) -> None:
        assert not self.is_mapped
        self._device.call("map")
        self.is_mapped = True
        if self.bytes.untyped_storage().nbytes() == 0:
            self.bytes.untyped_storage().resize_(self.num_bytes)
        self.bytes.fill_(0xEE)
        self._device.mapped_bytes += self.num_bytes

    def unmap(self) -> None:
        if self.is_mapped:
            assert not self._device.queue, "memory was freed under a copy"
            self._device.calls.append("unmap")
            self.is_mapped = False
            if self.keeps_address:
                self.bytes.fill_(0xEE)
            else:
                self.bytes.untyped_storage().resize_(0)
            self._device.mapped_bytes -= self.num_bytes

    def free(self) -> None:
        self.unmap()
        self._device.calls.append("free")
        self._device.regions.remove(self)


class FakeEvent:
    def __init__(self, device: FakeDevice) -> None:
        self._device = device
        self._position = device.num_enqueued

    def wait(self) -> None:
        self._device.run_until(self._position)

    synchronize = wait


class FakeDevice:
    """Implements DeviceCopier. fail_at: the n-th call of a kind (from 0) raises."""

    def __init__(self, keeps_address: bool = True, **fail_at: int) -> None:
        self.device = torch.device("cpu")
        self.keeps_address = keeps_address
        self.calls: list[str] = []
        self.queue: list[tuple[int, object]] = []
        self.num_enqueued = 0
        self.copies: list[Copy] = []
        self.registered: dict[int, int] = {}
        self.regions: list[FakeRegion] = []
        self.mapped_bytes = 0
        self._fail_at = fail_at

    def call(self, kind: str) -> None:
        count = self.calls.count(kind)
        self.calls.append(kind)
        if self._fail_at.get(kind) == count:
            error = InternalError if kind in {"copy", "convert"} else UnavailableError
            raise error(f"no {kind} today")

    def register(self, address: int, num_bytes: int) -> None:
        self.call("register")
        self.registered[address] = num_bytes

    def unregister(self, address: int) -> None:
        del self.registered[address]

    def reserve(self, num_bytes: int) -> FakeRegion:
        self.call("reserve")
        region = FakeRegion(self, num_bytes, self.keeps_address)
        self.regions.append(region)
        return region

    def copy(self, arena_address: int, region: FakeRegion, copies: Iterable[Copy]) -> None:
        for copy in copies:
            self.call("copy")
            assert region.is_mapped
            assert copy.target + copy.num_bytes <= region.num_bytes
            first, last = arena_address + copy.source, arena_address + copy.source_end
            pieces = [
                begin
                for begin, size in self.registered.items()
                if first < begin + size and begin < last
            ]
            assert len(pieces) <= 1, "a copy crosses a registration"
            self.copies.append(copy)
            self._enqueue(lambda copy=copy: self._move(arena_address, region, copy))

    def convert(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.call("convert")
        self._enqueue(lambda: target.copy_(source))

    def record(self) -> FakeEvent:
        return FakeEvent(self)

    def synchronize(self) -> None:
        self.run_until(self.num_enqueued)

    def run_until(self, position: int) -> None:
        while self.queue and self.queue[0][0] < position:
            self.queue.pop(0)[1]()

    def _enqueue(self, work: object) -> None:
        self.queue.append((self.num_enqueued, work))
        self.num_enqueued += 1

    @staticmethod
    def _move(arena_address: int, region: FakeRegion, copy: Copy) -> None:
        assert region.is_mapped
        for row in range(copy.num_rows):
            begin = copy.target + row * copy.row_bytes
            source = (ctypes.c_ubyte * copy.row_bytes).from_address(
                arena_address + copy.source + row * copy.pitch_bytes
            )
            region.bytes[begin : begin + copy.row_bytes] = torch.frombuffer(
                bytearray(source), dtype=torch.uint8
            )


class FakeArena:
    """Random bytes with tensors in them. Every placing is a name, dtype, shape and begin."""

    def __init__(self, num_bytes: int, seed: int = 0) -> None:
        self.memory = mmap.mmap(-1, num_bytes)
        self.bytes = np.frombuffer(self.memory, np.uint8)
        self.address = self.bytes.ctypes.data
        self.num_bytes = num_bytes
        self.bytes[:] = np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)

    def read(self, tensor: TensorSlice) -> bytes:
        return self.bytes[tensor.offset : tensor.offset + tensor.num_bytes].tobytes()
