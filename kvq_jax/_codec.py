"""The arithmetic of `kvq_core.codec` in jnp, bit for bit on a CPU.

XLA flushes subnormals there, so values change format as integers and meet float arithmetic only where a flush cannot
show: codes round to zero long before a float32 is subnormal. Per-tensor scales must lie within 1e-30 and 1e30, so that
neither they nor their products with codes come near.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvq_core.modes import KVQuantMode

_INFINITY_BITS = 0x7F800000
_NAN_BITS = 0x7FC00000
_NAN_CODES = {"float8_e4m3fn": 0x7F, "float8_e5m2": 0x7E, "bfloat16": 0x7FC0, "float16": 0x7E00, "float32": _NAN_BITS}


def encode_rows(x: jax.Array, mode: KVQuantMode, tensor_scale: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Encode rows ``[..., dim]`` of bfloat16, float16 or float32 as the bytes that a cache stores.

    Returns:
        uint8 ``[..., row_bytes]``, and for a per-token-head mode its scales as uint8 ``[..., 4]``, else None.
    """
    if mode.is_per_token_head:
        codes, scale_bits = _encode_per_token_head(_as_float32(x), mode)
        return _as_bytes(codes), _as_bytes(scale_bits)
    if mode.is_per_tensor:
        return _as_bytes(_encode_per_tensor(_as_float32(x), mode, tensor_scale)), None
    return _as_bytes(cast(x, mode.code_dtype)), None


def decode_rows(row_bytes: jax.Array, mode: KVQuantMode, scales: jax.Array) -> jax.Array:
    """Return the float32 values ``[..., dim]`` of stored rows, uint8 ``[..., row_bytes]``.

    Args:
        row_bytes: rows of codes.
        mode: the mode of the side.
        scales: uint8 ``[..., 4]`` of a per-token-head mode, a float32 scalar of a per-tensor mode; else ignored.
    """
    values = _as_float32(_from_bytes(row_bytes, mode.code_dtype))
    if mode.is_per_token_head:
        return values * _from_bytes(scales, np.dtype(np.float32))
    return values * scales if mode.is_per_tensor else values


def cast(x: jax.Array, dtype: Any) -> jax.Array:
    """Cast between bfloat16, float16 and float32: a copy of the bits, or one rounding with the format's own NaN."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    bits = lax.bitcast_convert_type(_as_float32(x), jnp.uint32)
    codes = bits if dtype == np.float32 else _round_bits(bits, dtype)
    codes = jnp.where(bits & 0x7FFFFFFF > _INFINITY_BITS, jnp.asarray(_NAN_CODES[dtype.name], codes.dtype), codes)
    return lax.bitcast_convert_type(codes, dtype)


def _encode_per_token_head(x: jax.Array, mode: KVQuantMode) -> tuple[jax.Array, jax.Array]:
    qmax = np.float32(mode.qmax)
    magnitudes = lax.bitcast_convert_type(x, jnp.uint32) & 0x7FFFFFFF
    absmax_bits = magnitudes.max(axis=-1, keepdims=True)  # on bits: exact, and NaN is the largest
    finite = absmax_bits < _INFINITY_BITS
    absmax = lax.bitcast_convert_type(absmax_bits, jnp.float32)
    scale = jnp.maximum(absmax * (np.float32(1) / qmax), np.float32(1e-6))
    inverse = 1 / scale  # one division a row: XLA turns x / broadcast(scale) into something else
    codes = jnp.where(finite, _round_to_codes(x * inverse, mode), 0)
    scale_bits = jnp.where(finite, lax.bitcast_convert_type(scale, jnp.uint32), _NAN_BITS)
    return codes, scale_bits


def _encode_per_tensor(x: jax.Array, mode: KVQuantMode, scale: jax.Array) -> jax.Array:
    y = x * (1 / scale)
    codes = _round_to_codes(y, mode)
    nan_code = jnp.asarray(_NAN_CODES[mode.code_dtype.name], codes.dtype)
    return jnp.where(jnp.isfinite(x) & ~jnp.isnan(y), codes, nan_code)


def _round_to_codes(y: jax.Array, mode: KVQuantMode) -> jax.Array:
    """Round to the nearest code, ties to even, saturating at ``mode.qmax``; codes as uint8."""
    qmax = np.float32(mode.qmax)
    if mode.code_dtype == np.int8:
        codes = jnp.clip(jnp.rint(y), -qmax, qmax).astype(jnp.int8)
        return lax.bitcast_convert_type(codes, jnp.uint8)
    return _round_bits(lax.bitcast_convert_type(jnp.clip(y, -qmax, qmax), jnp.uint32), mode.code_dtype)


def _round_bits(bits: jax.Array, dtype: np.dtype) -> jax.Array:
    """Round float32 bits, NaN aside, to those of a smaller float format: ties to even, past its range to infinity."""
    info = jnp.finfo(dtype)
    shift, least_exponent = 23 - info.nmant, 127 + info.minexp  # of the least normal, in float32's biased exponents
    magnitude = bits & 0x7FFFFFFF
    exponent = jnp.maximum(magnitude >> 23, 1)
    normal = _shift_to_nearest(magnitude - ((least_exponent - 1) << 23), shift)
    significand = jnp.where(magnitude >> 23 > 0, magnitude & 0x7FFFFF | 0x800000, magnitude)
    subnormal = _shift_to_nearest(significand, jnp.clip(shift + least_exponent - exponent.astype(jnp.int32), 1, 31))
    rounded = jnp.where(exponent >= least_exponent, normal, subnormal)
    if info.bits == 16:
        rounded = jnp.minimum(rounded, (1 << 15) - (1 << info.nmant))
    sign = bits >> 31 << (info.bits - 1)
    return (rounded | sign).astype(jnp.uint8 if info.bits == 8 else jnp.uint16)


def _shift_to_nearest(x: jax.Array, shift: int | jax.Array) -> jax.Array:
    """``x / 2**shift`` for uint32, rounded to nearest, ties to even."""
    shift = jnp.asarray(shift, jnp.uint32)
    return x + ((jnp.uint32(1) << (shift - 1)) - 1) + (x >> shift & 1) >> shift


def _as_float32(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << 16
        return lax.bitcast_convert_type(bits, jnp.float32)
    return x.astype(jnp.float32)  # exact: the others have no value that is subnormal in float32


def _as_bytes(values: jax.Array) -> jax.Array:
    """``[..., n]`` as uint8 ``[..., n * itemsize]``."""
    row_bytes = values.shape[-1] * values.dtype.itemsize
    return lax.bitcast_convert_type(values, jnp.uint8).reshape(*values.shape[:-1], row_bytes)


def _from_bytes(row_bytes: jax.Array, dtype: np.dtype) -> jax.Array:
    """uint8 ``[..., n * itemsize]`` as ``[..., n]``."""
    if dtype.itemsize == 1:
        return lax.bitcast_convert_type(row_bytes, dtype)
    n = row_bytes.shape[-1] // dtype.itemsize
    return lax.bitcast_convert_type(row_bytes.reshape(*row_bytes.shape[:-1], n, dtype.itemsize), dtype)
