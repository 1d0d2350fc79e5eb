"""Values are looked at by their bits, whatever their type; copies may be rounded, not changed."""

import numpy as np
import pytest

from flashserve.store.adapters.values import is_copy, is_finite

BF16_BITS = {"one": 0x3F80, "largest": 0x7F7F, "infinite": 0x7F80, "nan": 0x7FC0, "-inf": 0xFF80}


def f32(*values: float) -> memoryview:
    return memoryview(np.array(values, np.float32).tobytes())


def f16(*values: float) -> memoryview:
    return memoryview(np.array(values, np.float16).tobytes())


def bf16(*bits: int) -> memoryview:
    return memoryview(np.array(bits, np.uint16).tobytes())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_finite_number_is_found(bad: float) -> None:
    assert not is_finite("F32", f32(0, 1, bad))
    assert not is_finite("F16", f16(0, 1, bad))


@pytest.mark.parametrize("name", ["infinite", "nan", "-inf"])
def test_in_bf16_too(name: str) -> None:
    assert not is_finite("BF16", bf16(BF16_BITS["one"], BF16_BITS[name]))


def test_the_largest_and_smallest_numbers_are_finite() -> None:
    limits = np.finfo(np.float32)
    assert is_finite("F32", f32(limits.max, limits.min, limits.smallest_subnormal, -0.0))
    assert is_finite("F16", f16(65504, -65504))
    assert is_finite("BF16", bf16(BF16_BITS["largest"]))
    assert is_finite("F32", f32())


def test_the_last_value_of_many_is_looked_at() -> None:
    values = np.zeros((9 << 20) // 4, np.float32)
    assert is_finite("F32", memoryview(values.tobytes()))
    values[-1] = np.nan
    assert not is_finite("F32", memoryview(values.tobytes()))


@pytest.mark.parametrize("cut", [0, 1, 3, 4, 11, 12])
def test_a_copy_is_one_however_the_original_is_cut(cut: int) -> None:
    data = bytes(f32(1.5, -2.25, 3e-9))
    assert is_copy("F32", memoryview(data), "F32", [data[:cut], data[cut:]])
    assert not is_copy("F32", memoryview(data), "F32", [data[:cut]] if cut < 12 else [b""])


def test_a_copy_may_be_wider_or_rounded() -> None:
    one_third = np.float32(1 / 3)
    rounded = float(np.float16(one_third))
    assert is_copy("F32", f32(1.0, rounded), "F16", [bytes(f16(1.0, rounded))])
    assert is_copy("F16", f16(rounded), "F32", [bytes(f32(one_third))])
    assert is_copy("BF16", bf16(0x3EAB), "F32", [bytes(f32(one_third))])
    assert is_copy("BF16", bf16(0x3F80), "BF16", [bytes(bf16(0x3F80))])


@pytest.mark.parametrize(
    ("dtype", "data", "original_dtype", "original"),
    [
        ("F32", f32(1.0), "F32", f32(1.0000001)),
        ("F16", f16(1.0), "F32", f32(1.01)),
        ("BF16", bf16(0x3EAA), "F32", f32(1 / 3)),
        ("F32", f32(1.0, 2.0), "F32", f32(1.0)),
        ("F32", f32(1.0), "F32", f32(1.0, 2.0)),
        ("F32", f32(1.0), "F8_E4M3", f32(1.0)),
        ("I8", f32(1.0), "F32", f32(1.0)),
    ],
)
def test_other_values_are_no_copy(
    dtype: str, data: memoryview, original_dtype: str, original: memoryview
) -> None:
    assert not is_copy(dtype, data, original_dtype, [bytes(original)])
