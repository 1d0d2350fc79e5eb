"""Moves bytes from the arena to a device: on CUDA asynchronously, on a CPU at once.

Only workers import this module; the rest of the store knows no tensor library.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from typing import Protocol

import numpy as np
import torch

from flashserve.errors import InternalError, UnavailableError
from flashserve.store.device.cudart import Cudart
from flashserve.store.device.loadplan import Copy
from flashserve.store.device.regions import Registrar
from flashserve.store.device.vmm import VirtualMemory


class Region(Protocol):
    """Device memory of one model. It starts without memory."""

    num_bytes: int
    keeps_address: bool
    """Whether `map` brings back the address that the region had before `unmap`."""

    @property
    def bytes(self) -> torch.Tensor:
        """[num_bytes], uint8; first asked for while mapped. Views are valid whenever it is."""

    def map(self) -> None:
        """Raises UnavailableError when the device has not enough memory; nothing is taken then."""

    def unmap(self) -> None:
        """Gives the memory back; what it held is lost. Nothing on the device may use it now."""

    def free(self) -> None:
        """Gives memory and addresses back."""


class Event(Protocol):
    """A point in the copies."""

    def wait(self) -> None:
        """What this thread gives the device from now on runs after that point."""

    def synchronize(self) -> None:
        """Returns when that point is reached."""


class DeviceCopier(Registrar, Protocol):
    """One device and the stream on which bytes reach it. Copies run in the order of the calls."""

    device: torch.device

    def reserve(self, num_bytes: int) -> Region: ...

    def copy(self, arena_address: int, region: Region, copies: Iterable[Copy]) -> None:
        """Enqueues copies. The mapping at `arena_address` must stay until they are done."""

    def convert(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueues the conversion of one device tensor into another of the same shape."""

    def record(self) -> Event:
        """The point after everything that was enqueued so far."""

    def synchronize(self) -> None:
        """Returns when the device has nothing left to do, copies or computing."""


class CpuCopier:
    """Plain memory copies: what the device's path is tested with, and compared to."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")

    def register(self, address: int, num_bytes: int) -> None:
        """A processor reads all memory alike."""

    def unregister(self, address: int) -> None: ...

    def reserve(self, num_bytes: int) -> Region:
        return _HostRegion(num_bytes)

    def copy(self, arena_address: int, region: Region, copies: Iterable[Copy]) -> None:
        address = region.bytes.data_ptr()
        for copy in copies:
            for row in range(copy.num_rows):
                ctypes.memmove(
                    address + copy.target + row * copy.row_bytes,
                    arena_address + copy.source + row * copy.pitch_bytes,
                    copy.row_bytes,
                )

    def convert(self, source: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(source)

    def record(self) -> Event:
        return _Done()

    def synchronize(self) -> None: ...


class _Done:
    def wait(self) -> None: ...

    def synchronize(self) -> None: ...


class _HostRegion:
    """Anonymous memory, whose pages go back to the kernel while it is not mapped."""

    keeps_address = True

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._memory: mmap.mmap | None = mmap.mmap(
            -1, max(num_bytes, 1), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        self.bytes = torch.from_numpy(np.frombuffer(self._memory, np.uint8))[:num_bytes]

    def map(self) -> None:
        assert self._memory is not None

    def unmap(self) -> None:
        if self._memory is not None:
            self._memory.madvise(mmap.MADV_DONTNEED)

    def free(self) -> None:
        self.unmap()
        # Whoever still holds a view of it keeps the addresses, and nothing else.
        self._memory = None


class CudaCopier:
    """One CUDA device, with a stream of its own for copies.

    Make it after the worker's first CUDA call, in its first-use work. Regions keep their addresses
    where cuda.bindings is installed; else `address_refusal` says why they do not.
    """

    def __init__(self, device: torch.device) -> None:
        """Raises UnavailableError: torch has no CUDA, or no such device."""
        if not torch.cuda.is_available():
            raise UnavailableError("torch finds no CUDA device")
        self.device = torch.device("cuda", device.index or 0)
        torch.zeros(1, device=self.device)
        self._cudart = Cudart(device.index or 0)
        self._stream = torch.cuda.Stream(self.device)
        self._virtual: VirtualMemory | None = None
        self.address_refusal: str | None = None
        try:
            self._virtual = VirtualMemory(self.device)
        except (UnavailableError, InternalError) as error:
            self.address_refusal = error.message

    @property
    def registers_read_only(self) -> bool:
        return self._cudart.registers_read_only

    def register(self, address: int, num_bytes: int) -> None:
        self._cudart.register(address, num_bytes)

    def unregister(self, address: int) -> None:
        self._cudart.unregister(address)

    def reserve(self, num_bytes: int) -> Region:
        if self._virtual is not None:
            return self._virtual.reserve(num_bytes)
        return _TorchRegion(self.device, num_bytes)

    def copy(self, arena_address: int, region: Region, copies: Iterable[Copy]) -> None:
        address, stream = region.bytes.data_ptr(), self._stream.cuda_stream
        with torch.cuda.device(self.device):
            for copy in copies:
                target, source = address + copy.target, arena_address + copy.source
                if copy.num_rows == 1:
                    self._cudart.copy(target, source, copy.row_bytes, stream)
                else:
                    self._cudart.copy_rows(
                        target, source, copy.pitch_bytes, copy.row_bytes, copy.num_rows, stream
                    )

    def convert(self, source: torch.Tensor, target: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source)

    def record(self) -> Event:
        return _CudaEvent(self.device, self._stream)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)


class _CudaEvent:
    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        self._device = device
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()


class _TorchRegion:
    """Memory of torch's allocator: views survive `unmap`, their address does not."""

    keeps_address = False

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self._device = device
        self.bytes = torch.empty(num_bytes, dtype=torch.uint8, device="meta")

    def map(self) -> None:
        try:
            if self.bytes.is_meta:
                self.bytes = torch.empty(self.num_bytes, dtype=torch.uint8, device=self._device)
            else:
                self.bytes.untyped_storage().resize_(self.num_bytes)
        except torch.OutOfMemoryError as error:
            raise UnavailableError(
                f"the device has no {self.num_bytes} bytes for the weights"
            ) from error
        # The allocator may hand out memory that the compute stream is not yet done with.
        torch.cuda.synchronize(self._device)

    def unmap(self) -> None:
        if not self.bytes.is_meta:
            self.bytes.untyped_storage().resize_(0)
            torch.cuda.empty_cache()

    def free(self) -> None:
        self.unmap()
