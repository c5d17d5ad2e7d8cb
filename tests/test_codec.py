"""The numpy codec: literal bytes worked out by hand, and agreement with exact rational arithmetic."""

from __future__ import annotations

import itertools
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_core import KVQuantMode, get_kv_quant_mode
from kvq_core.codec import MIN_SCALE, decode_rows, encode_rows

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-149  # the smallest float32
HUGE = float(np.finfo(np.float32).max)
PER_TOKEN_HEAD = [mode for mode in KVQuantMode if mode.is_per_token_head]
PER_TENSOR = [mode for mode in KVQuantMode if mode.is_per_tensor]
UNQUANTIZED = [mode for mode in KVQuantMode if not mode.is_quantized]
# code dtype: bits of the mantissa, exponent bias
FLOAT8 = {"float8_e4m3fn": (3, 7), "float8_e5m2": (2, 15)}


def as_bytes(codes):
    """The codes as unsigned integers of their width."""
    return codes.view(f"u{codes.itemsize}").tolist()


def float32_from_bits(bits):
    return np.array(bits, np.uint32).view(np.float32)


# A row whose absmax is QMAX has a scale of exactly 1, so that each code is its value rounded: ties show.
@pytest.mark.parametrize(
    ("name", "row", "scale_bits", "codes"),
    [
        ("int8_per_token_head", [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5], 0x3F800000, [127, 0, 2, 2, 0, 254, 254]),
        ("int8_per_token_head", [-127, 126.5, 125.5, 0.49, -0.0], 0x3F800000, [129, 126, 126, 0, 0]),
        ("int8_per_token_head", [127, 0.50000006, 0.49999997, TINY], 0x3F800000, [127, 1, 0, 0]),
        ("int8_per_token_head", [0.0, -0.0, TINY, -1e-40], 0x358637BD, [0, 0, 0, 0]),
        ("int8_per_token_head", [1e-6, -2e-6, 1.27e-4], 0x358637BD, [1, 254, 127]),
        ("int8_per_token_head", [HUGE, -HUGE, HUGE / 2, 1.0], 0x7C010203, [127, 129, 64, 0]),
        ("int8_per_token_head", [1.0, INF, 0.0], 0x7FC00000, [0, 0, 0]),
        ("int8_per_token_head", [1.0, -INF, -1.0], 0x7FC00000, [0, 0, 0]),
        ("int8_per_token_head", [NAN, 1.0, -0.0], 0x7FC00000, [0, 0, 0]),
        ("fp8_per_token_head", [448, -448, 1, 0.0, -0.0], 0x3F800000, [0x7E, 0xFE, 0x38, 0x00, 0x80]),
        ("fp8_per_token_head", [448, 17, 19, -17, 432, 400], 0x3F800000, [0x7E, 0x58, 0x5A, 0xD8, 0x7E, 0x7C]),
        # Subnormal codes are multiples of 2^-9; 2^-6 is the smallest normal one.
        ("fp8_per_token_head", [448, 2**-9, 2**-10, 3 * 2**-10], 0x3F800000, [0x7E, 0x01, 0x00, 0x02]),
        ("fp8_per_token_head", [448, -(2**-10), 2**-6, 15 * 2**-10], 0x3F800000, [0x7E, 0x80, 0x08, 0x08]),
        ("fp8_per_token_head", [0.0, -0.0, TINY, -TINY], 0x358637BD, [0x00, 0x80, 0x00, 0x80]),
        ("fp8_per_token_head", [HUGE, -HUGE, 1.0, -1.0], 0x7B124924, [0x7E, 0xFE, 0x00, 0x80]),
        ("fp8_per_token_head", [-INF, 1.0, -0.0], 0x7FC00000, [0, 0, 0]),
        ("fp8_per_token_head", [1.0, -1.0, NAN], 0x7FC00000, [0, 0, 0]),
    ],
)
def test_per_token_head_bytes_are_literal(name, row, scale_bits, codes):
    got, scales = encode_rows(np.array([row], np.float32), get_kv_quant_mode(name))
    assert as_bytes(got) == [codes]
    assert as_bytes(scales) == [scale_bits]


@pytest.mark.parametrize(
    ("name", "scale", "row", "codes"),
    [
        ("fp8_e4m3", 1.0, [1.0, -0.0, 448, 449, 1e9, -1e9], [0x38, 0x80, 0x7E, 0x7E, 0x7E, 0xFE]),
        ("fp8_e4m3", 0.5, [100, -100, 1000, 2**-11, 2**-10], [0x74, 0xF4, 0x7E, 0x00, 0x01]),
        ("fp8_e4m3", 1.0, [INF, -INF, NAN, -NAN, TINY], [0x7F, 0x7F, 0x7F, 0x7F, 0x00]),
        ("fp8_e4m3", 2.0**-120, [HUGE, -HUGE, 0.0], [0x7E, 0xFE, 0x00]),
        ("fp8_e5m2", 1.0, [1.0, 1.125, 1.375, 57344, 57345, 1e9], [0x3C, 0x3C, 0x3E, 0x7B, 0x7B, 0x7B]),
        ("fp8_e5m2", 1.0, [2**-16, 2**-17, 3 * 2**-17, -TINY, -1e9], [0x01, 0x00, 0x02, 0x80, 0xFB]),
        ("fp8_e5m2", 1.0, [INF, -INF, NAN, -NAN], [0x7E, 0x7E, 0x7E, 0x7E]),
    ],
)
def test_per_tensor_bytes_are_literal(name, scale, row, codes):
    got, scales = encode_rows(np.array([row], np.float32), get_kv_quant_mode(name), scale)
    assert as_bytes(got) == [codes]
    assert scales is None


def test_per_tensor_scale_without_a_reciprocal_gives_no_code_that_depends_on_the_platform():
    codes, _ = encode_rows(np.array([[0.0, -0.0, 1.0]], np.float32), KVQuantMode.FP8_E4M3, 0.0)
    assert as_bytes(codes) == [[0x7F, 0x7F, 0x7E]]


@pytest.mark.parametrize(
    ("name", "source", "bits", "codes"),
    [
        # Ties to even at 1 + 2^-8; a finite overflow is infinity; a subnormal stays.
        ("bfloat16", np.float32, [0x3F808000, 0x3F818000, 0x3F808001], [0x3F80, 0x3F82, 0x3F81]),
        ("bfloat16", np.float32, [0x7F7FFFFF, 0xFF7FFFFF, 0x000116C2, 0x80000000], [0x7F80, 0xFF80, 0x0001, 0x8000]),
        ("bfloat16", np.float32, [0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000], [0x7FC0, 0x7FC0, 0x7F80, 0xFF80]),
        ("bfloat16", np.float16, [0x3C00, 0xFC01, 0x0001, 0x7C00], [0x3F80, 0x7FC0, 0x3380, 0x7F80]),
        ("bfloat16", ml_dtypes.bfloat16, [0xFF81, 0x7FFF, 0x0001, 0x8000], [0xFF81, 0x7FFF, 0x0001, 0x8000]),
        # 65520 is halfway past the largest float16; 2^-25 half of the smallest.
        ("float16", np.float32, [0x477FF000, 0x477FEFFF, 0xC7800000], [0x7C00, 0x7BFF, 0xFC00]),
        ("float16", np.float32, [0x33000000, 0x33000001, 0x33800000, 0x80000000], [0x0000, 0x0001, 0x0001, 0x8000]),
        ("float16", np.float32, [0x7F800001, 0xFFC00000, 0xFF800000], [0x7E00, 0x7E00, 0xFC00]),
        ("float16", ml_dtypes.bfloat16, [0x3F80, 0xFF81, 0x7F7F], [0x3C00, 0x7E00, 0x7C00]),
        ("float16", np.float16, [0xFC01, 0x7FFF, 0x8001], [0xFC01, 0x7FFF, 0x8001]),
        ("float32", np.float16, [0x3C00, 0xFC01, 0x0001, 0x8000], [0x3F800000, 0x7FC00000, 0x33800000, 0x80000000]),
        ("float32", ml_dtypes.bfloat16, [0x3F80, 0xFF81, 0x0001], [0x3F800000, 0x7FC00000, 0x00010000]),
        ("float32", np.float32, [0x7F800001, 0xFFFFFFFF, 0x00000001], [0x7F800001, 0xFFFFFFFF, 0x00000001]),
    ],
)
def test_unquantized_bytes_are_literal(name, source, bits, codes):
    x = np.array([bits], f"u{np.dtype(source).itemsize}").view(source)
    got, scales = encode_rows(x, get_kv_quant_mode(name))
    assert as_bytes(got) == [codes]
    assert scales is None


@pytest.mark.parametrize(
    ("name", "codes", "scales", "values"),
    [
        ("int8_per_token_head", [-127, 0, 3], [0.5], [-63.5, 0.0, 1.5]),
        ("int8_per_token_head", [0, 1, 127], [NAN], [NAN, NAN, NAN]),
        ("fp8_per_token_head", [0x7E, 0x80, 0x01], [2.0], [896.0, -0.0, 2.0**-8]),
        ("fp8_e4m3", [0x7F, 0x7E, 0xB8], 0.25, [NAN, 112.0, -0.25]),
        ("fp8_e5m2", [0x7E, 0x7B, 0x3E], 2.0, [NAN, 114688.0, 3.0]),
        ("bfloat16", [0x3F80, 0x7FC0, 0xFF80], None, [1.0, NAN, -INF]),
    ],
)
def test_decoded_values_are_literal(name, codes, scales, values):
    mode = get_kv_quant_mode(name)
    stored = np.array([codes], f"u{mode.code_dtype.itemsize}" if mode.code_dtype.kind != "i" else np.int8)
    got = decode_rows(stored.view(mode.code_dtype), mode, scales)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array([values], np.float32))
    np.testing.assert_array_equal(np.signbit(got), np.signbit(np.array([values], np.float32)))


def test_decoding_rounds_the_product_to_float32():
    scale = float32_from_bits([0x3DCCCCCD])  # 0.1
    got = decode_rows(np.array([[3]], np.int8), KVQuantMode.INT8_PER_TOKEN_HEAD, scale)
    assert as_bytes(got) == [[0x3E99999A]]


def test_minimal_scale_is_the_float32_nearest_to_1e_6():
    assert as_bytes(np.array([MIN_SCALE])) == [0x358637BD]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("mode", [mode for mode in KVQuantMode if mode.is_quantized])
def test_half_precision_input_is_encoded_as_its_float32_value(mode, dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype).reshape(-1, 32)
    codes, scales = encode_rows(x, mode, 0.37)
    codes_of_float32, scales_of_float32 = encode_rows(x.astype(np.float32), mode, 0.37)
    assert as_bytes(codes) == as_bytes(codes_of_float32)
    assert scales is None or as_bytes(scales) == as_bytes(scales_of_float32)


@pytest.mark.parametrize("mode", KVQuantMode)
def test_rows_are_independent_of_each_other_and_of_their_memory_order(mode):
    x = np.random.default_rng(0).normal(size=(3, 5, 16)).astype(np.float32)
    x[1, 2, 3] = NAN
    codes, scales = encode_rows(x, mode)
    for order in (x.swapaxes(0, 1).copy().swapaxes(0, 1), np.repeat(x, 2, axis=1)[:, ::2]):
        assert as_bytes(encode_rows(order, mode)[0]) == as_bytes(codes)
    for index in np.ndindex(3, 5):
        row_codes, row_scale = encode_rows(x[index], mode)
        assert as_bytes(row_codes) == as_bytes(codes[index])
        assert scales is None or as_bytes(row_scale.reshape(1)) == as_bytes(scales[index].reshape(1))


@pytest.mark.parametrize("mode", KVQuantMode)
def test_no_rows_are_no_codes(mode):
    codes, scales = encode_rows(np.zeros((0, 2, 16), np.float32), mode)
    assert (codes.shape, codes.dtype) == ((0, 2, 16), mode.code_dtype)
    assert scales is None or scales.shape == (0, 2)
    assert decode_rows(codes, mode, scales if mode.is_per_token_head else 1.0).shape == (0, 2, 16)


@pytest.mark.parametrize("mode", PER_TENSOR)
def test_every_boundary_between_float8_codes_rounds_to_nearest_even(mode):
    values = float8_values(mode)
    below, above = np.arange(len(values) - 1, dtype=np.uint8), np.arange(1, len(values), dtype=np.uint8)
    middle = np.float32([(low + high) / 2 for low, high in itertools.pairwise(values)])
    even = np.where(below % 2 == 0, below, above)
    rows = np.stack([np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(INF)), -middle])
    codes, _ = encode_rows(rows, mode)
    assert as_bytes(codes) == np.stack([below, even, above, even | 0x80]).tolist()


@pytest.mark.parametrize("mode", PER_TENSOR)
def test_every_float8_code_is_its_own_encoding(mode):
    values = np.float32(float8_values(mode))
    codes, _ = encode_rows(values, mode)
    assert as_bytes(codes) == list(range(len(values)))
    np.testing.assert_array_equal(decode_rows(codes, mode, 1.0), values)


BIT_ROWS = st.lists(st.integers(0, 2**32 - 1), min_size=16, max_size=16).map(float32_from_bits)
NORMAL_ROWS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=16, max_size=16).map(np.float32)
SCALES = st.floats(2.0**-100, 2.0**100, width=32)


@settings(deadline=None)
@given(x=BIT_ROWS | NORMAL_ROWS)
@pytest.mark.parametrize("mode", PER_TOKEN_HEAD)
def test_per_token_head_codec_agrees_with_exact_arithmetic(mode, x):
    codes, scale = encode_rows(x, mode)
    expected_codes, expected_scale = exact_per_token_head(x, mode)
    assert as_bytes(codes) == expected_codes
    np.testing.assert_array_equal(scale, np.float32(expected_scale))


@settings(deadline=None)
@given(x=BIT_ROWS | NORMAL_ROWS, scale=SCALES)
@pytest.mark.parametrize("mode", PER_TENSOR)
def test_per_tensor_codec_agrees_with_exact_arithmetic(mode, x, scale):
    nan_code = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7E}[mode.code_dtype.name]
    inverse = round_to_float32(1 / Fraction(scale))
    expected = [exact_float8_code(value, inverse, mode) if np.isfinite(value) else nan_code for value in x.tolist()]
    assert as_bytes(encode_rows(x, mode, scale)[0]) == expected


@settings(deadline=None)
@given(x=BIT_ROWS | NORMAL_ROWS)
@pytest.mark.parametrize("mode", PER_TOKEN_HEAD)
def test_finite_rows_come_back_within_half_a_step(mode, x):
    x = np.where(np.isfinite(x), x, np.float32(1.5))
    codes, scale = encode_rows(x, mode)
    restored = decode_rows(codes, mode, scale).astype(np.float64)
    # Half a step, and the float32 roundings of absmax * const, 1 / scale, x * inv and code * scale.
    magnitudes = np.abs(x.astype(np.float64))
    if mode is KVQuantMode.INT8_PER_TOKEN_HEAD:
        half_step = 0.5 * float(scale)
    else:
        half_step = np.maximum(magnitudes * 2.0**-4, float(scale) * 2.0**-10)
    slack = magnitudes.max() * 8 * 2.0**-24 + TINY
    assert (np.abs(restored - x) <= half_step + slack).all()


@settings(deadline=None)
@given(x=BIT_ROWS)
@pytest.mark.parametrize("mode", PER_TOKEN_HEAD)
def test_per_token_head_codes_never_hold_minus_128_or_nan(mode, x):
    codes, _ = encode_rows(x, mode)
    forbidden = {128} if mode is KVQuantMode.INT8_PER_TOKEN_HEAD else {0x7F, 0xFF}
    assert not forbidden & set(as_bytes(codes))


@settings(deadline=None)
@given(x=BIT_ROWS)
@pytest.mark.parametrize("mode", UNQUANTIZED)
def test_unquantized_codec_agrees_with_exact_arithmetic(mode, x):
    codes, _ = encode_rows(x, mode)
    if mode is KVQuantMode.FLOAT32:
        assert as_bytes(codes) == x.view(np.uint32).tolist()
        return
    precision, min_exponent, largest = {"bfloat16": (8, -126, 2.0**128), "float16": (11, -14, 2.0**16)}[mode.value]
    restored = decode_rows(codes, mode, None).tolist()
    for value, got in zip(x.tolist(), restored, strict=True):
        if np.isfinite(value):
            exact = abs(float(round_to_grid(Fraction(value), precision, min_exponent)))
            value = np.copysign(exact if exact < largest else INF, value)
        np.testing.assert_equal(got, value)


def float8_values(mode):
    """The finite values of the codes from 0 up, by the definition of the format."""
    mantissa_bits, bias = FLOAT8[mode.code_dtype.name]
    values = []
    for code in range(256):
        exponent, mantissa = code >> mantissa_bits, (code & (1 << mantissa_bits) - 1) / (1 << mantissa_bits)
        values.append(mantissa * 2.0 ** (1 - bias) if exponent == 0 else (1 + mantissa) * 2.0 ** (exponent - bias))
        if values[-1] == mode.qmax:
            return values
    raise AssertionError(f"no code of {mode} is worth {mode.qmax}")


def floor_log2(x):
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= x else exponent - 1


def round_to_grid(x, precision, min_exponent):
    """The multiple of a unit in the last place nearest to the fraction ``x``, ties to even."""
    if x == 0:
        return x
    ulp = Fraction(2) ** (max(floor_log2(abs(x)), min_exponent) - precision + 1)
    return round(x / ulp) * ulp


def round_to_float32(x):
    return round_to_grid(x, 24, -126)


def exact_float8_code(value, inverse, mode):
    """The byte of one finite value, from fractions alone."""
    mantissa_bits, bias = FLOAT8[mode.code_dtype.name]
    limit = Fraction(mode.qmax)
    y = min(max(round_to_float32(Fraction(value) * inverse), -limit), limit)
    magnitude = abs(round_to_grid(y, mantissa_bits + 1, 1 - bias))
    sign = 0x80 if np.signbit(value) else 0
    exponent = max(floor_log2(magnitude), 1 - bias) if magnitude else 1 - bias
    steps = magnitude / Fraction(2) ** (exponent - mantissa_bits)
    return sign | int(steps + ((exponent + bias - 1) << mantissa_bits))


def exact_per_token_head(x, mode):
    """Codes as bytes and the scale of one row, from fractions alone."""
    if not np.isfinite(x).all():
        return [0] * len(x), NAN
    values = x.tolist()
    absmax = max(abs(Fraction(value)) for value in values)
    step = round_to_float32(1 / Fraction(mode.qmax))
    scale = max(round_to_float32(absmax * step), round_to_float32(Fraction(1, 10**6)))
    inverse = round_to_float32(1 / scale)
    if mode is not KVQuantMode.INT8_PER_TOKEN_HEAD:
        return [exact_float8_code(value, inverse, mode) for value in values], float(scale)
    codes = [round(round_to_float32(Fraction(value) * inverse)) for value in values]
    return [min(max(code, -127), 127) % 256 for code in codes], float(scale)
