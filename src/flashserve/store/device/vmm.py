"""Device memory whose address outlives its contents: reserved once, backed only while awake.

CUDA graphs hold addresses, so a sleeping model gives its physical memory back and keeps the
address range, through the driver's virtual memory calls. One mapping per region: with many small
ones, waking takes seconds.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from flashserve.errors import InternalError, UnavailableError


class VirtualMemory:
    """The driver's virtual memory management for one device.

    Raises:
        UnavailableError: cuda.bindings is not installed, or the device has no such calls.
    """

    def __init__(self, device: torch.device) -> None:
        try:
            self._driver: Any = importlib.import_module("cuda.bindings.driver")
        except ImportError as error:
            raise UnavailableError(f"cuda.bindings cannot be imported: {error}") from None
        torch.zeros(1, device=device)  # makes the context that the calls below belong to
        if not int(self.call("cuCtxGetCurrent")):
            raise UnavailableError("torch has made no CUDA context in this thread")
        driver = self._driver
        self._place = driver.CUmemAllocationProp()
        self._place.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._place.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._place.location.id = device.index
        self._access = driver.CUmemAccessDesc()
        self._access.location = self._place.location
        self._access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        recommended = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        self._granularity = int(
            self.call("cuMemGetAllocationGranularity", self._place, recommended)
        )
        self.device = device

    def reserve(self, num_bytes: int) -> VirtualRegion:
        """Addresses for `num_bytes`, rounded up to what the device maps; no memory yet."""
        size = max(-(-num_bytes // self._granularity), 1) * self._granularity
        address = int(self.call("cuMemAddressReserve", size, self._granularity, 0, 0))
        return VirtualRegion(self, address, size, num_bytes)

    def back(self, address: int, num_bytes: int) -> Any:
        """Gives the addresses memory; returns its handle.

        Raises:
            UnavailableError: the device has not enough free memory.
        """
        handle = self._create(num_bytes)
        try:
            self.call("cuMemMap", address, num_bytes, 0, handle, 0)
            try:
                self.call("cuMemSetAccess", address, num_bytes, [self._access], 1)
            except BaseException:
                self.call("cuMemUnmap", address, num_bytes)
                raise
        except BaseException:
            self.call("cuMemRelease", handle)
            raise
        return handle

    def _create(self, num_bytes: int) -> Any:
        try:
            return self.call("cuMemCreate", num_bytes, self._place, 0)
        except InternalError:
            torch.cuda.empty_cache()  # what torch keeps for later is free for the driver then
        try:
            return self.call("cuMemCreate", num_bytes, self._place, 0)
        except InternalError as error:
            raise UnavailableError(
                f"the device has no {num_bytes} bytes for the weights: {error.message}"
            ) from None

    def call(self, name: str, *arguments: Any) -> Any:
        """One driver call; returns its one value, if any.

        Raises:
            InternalError: it failed; names the call and the driver's code.
        """
        code, *values = getattr(self._driver, name)(*arguments)
        if int(code):
            raise InternalError(f"{name} failed: {code.name}")
        return values[0] if values else None


class VirtualRegion:
    """A range of device addresses, with memory between `map` and `unmap`."""

    keeps_address = True

    def __init__(
        self, memory: VirtualMemory, address: int, reserved_bytes: int, num_bytes: int
    ) -> None:
        self.num_bytes = num_bytes
        self._memory = memory
        self._address = address
        self._reserved_bytes = reserved_bytes
        self._handle: Any = None
        self._bytes: torch.Tensor | None = None

    @property
    def bytes(self) -> torch.Tensor:
        if self._bytes is None:
            assert self._handle is not None, "torch asks the driver about the address"
            self._bytes = torch.as_tensor(
                _Foreign(self._address, self.num_bytes), device=self._memory.device
            )
        return self._bytes

    def map(self) -> None:
        assert self._handle is None
        self._handle = self._memory.back(self._address, self._reserved_bytes)

    def unmap(self) -> None:
        handle, self._handle = self._handle, None
        if handle is not None:
            self._memory.call("cuMemUnmap", self._address, self._reserved_bytes)
            self._memory.call("cuMemRelease", handle)

    def free(self) -> None:
        self.unmap()
        self._bytes = None
        address, self._address = self._address, 0
        if address:
            self._memory.call("cuMemAddressFree", address, self._reserved_bytes)


class _Foreign:
    """Device memory that torch did not allocate, as it accepts it."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }
