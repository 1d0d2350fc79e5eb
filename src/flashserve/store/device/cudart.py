"""The few calls of the CUDA runtime that torch does not offer, in the library that torch loaded."""

from __future__ import annotations

import ctypes

import torch

from flashserve.errors import InternalError, UnavailableError

_HOST_TO_DEVICE = 1
_REGISTER_PORTABLE = 1
_REGISTER_READ_ONLY = 8
_ATTRIBUTE_READ_ONLY_REGISTER = 113  # cudaDevAttrHostRegisterReadOnlySupported


class Cudart:
    """Calls through ctypes, which let other threads run. Streams are torch's `cuda_stream`."""

    def __init__(self, device_index: int) -> None:
        """Raises UnavailableError: torch came without the CUDA runtime."""
        major = (torch.version.cuda or "0").split(".")[0]
        try:
            # Found by its name among the libraries of the process, which torch has loaded.
            self._library = ctypes.CDLL(f"libcudart.so.{major}")
        except OSError as error:
            raise UnavailableError(f"the CUDA runtime is not loaded: {error}") from None
        size, pointer, integer = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
        signatures = {
            "cudaHostRegister": (pointer, size, ctypes.c_uint),
            "cudaHostUnregister": (pointer,),
            "cudaDeviceGetAttribute": (ctypes.POINTER(integer), integer, integer),
            "cudaMemcpyAsync": (pointer, pointer, size, integer, pointer),
            "cudaMemcpy2DAsync": (pointer, size, pointer, size, size, size, integer, pointer),
        }
        for name, arguments in signatures.items():
            function = getattr(self._library, name)
            function.argtypes = arguments
            function.restype = integer
        self._library.cudaGetErrorString.argtypes = (integer,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        self._register_flags = _REGISTER_PORTABLE
        if self._supports_read_only(device_index):
            self._register_flags |= _REGISTER_READ_ONLY

    @property
    def registers_read_only(self) -> bool:
        """Whether memory that this process cannot write can be registered as such."""
        return bool(self._register_flags & _REGISTER_READ_ONLY)

    def register(self, address: int, num_bytes: int) -> None:
        code = self._library.cudaHostRegister(address, num_bytes, self._register_flags)
        if code:
            raise UnavailableError(
                f"CUDA does not register {num_bytes} bytes of host memory: {self._reason(code)}"
            )

    def unregister(self, address: int) -> None:
        self._check(self._library.cudaHostUnregister(address), "cudaHostUnregister")

    def copy(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        code = self._library.cudaMemcpyAsync(target, source, num_bytes, _HOST_TO_DEVICE, stream)
        self._check(code, "cudaMemcpyAsync")

    def copy_rows(
        self, target: int, source: int, pitch_bytes: int, row_bytes: int, num_rows: int, stream: int
    ) -> None:
        code = self._library.cudaMemcpy2DAsync(
            target, row_bytes, source, pitch_bytes, row_bytes, num_rows, _HOST_TO_DEVICE, stream
        )
        self._check(code, "cudaMemcpy2DAsync")

    def _supports_read_only(self, device_index: int) -> bool:
        value = ctypes.c_int()
        code = self._library.cudaDeviceGetAttribute(
            ctypes.byref(value), _ATTRIBUTE_READ_ONLY_REGISTER, device_index
        )
        self._check(code, "cudaDeviceGetAttribute")
        return bool(value.value)

    def _check(self, code: int, call: str) -> None:
        if code:
            raise InternalError(f"{call} failed: {self._reason(code)}")

    def _reason(self, code: int) -> str:
        """The error in words. Clears it, else the next unrelated call of torch reports it."""
        self._library.cudaGetLastError()
        text: bytes = self._library.cudaGetErrorString(code)
        return text.decode()
