"""The arithmetic of the byte format in numpy: rows of values to codes and scales, and back (DESIGN.md section 4).

This is the definition that every kernel reproduces bit for bit. All arithmetic is float32, rounded to nearest even.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kvq_core.modes import KVQuantMode

MIN_SCALE = np.float32(1e-6)

_INFINITY_BITS = np.uint32(0x7F800000)
_NAN = np.array(0x7FC00000, np.uint32).view(np.float32)[()]
# Casts of NaN differ between numpy, torch, XLA and Triton, so these bytes are written, never computed.
_NAN_CODES = {
    np.dtype(ml_dtypes.float8_e4m3fn): np.uint8(0x7F),
    np.dtype(ml_dtypes.float8_e5m2): np.uint8(0x7E),
    np.dtype(ml_dtypes.bfloat16): np.uint16(0x7FC0),
    np.dtype(np.float16): np.uint16(0x7E00),
    np.dtype(np.float32): np.uint32(0x7FC00000),
}


def encode_rows(
    x: np.ndarray, mode: KVQuantMode, scale: float | np.ndarray = 1.0
) -> tuple[np.ndarray, np.ndarray | None]:
    """Encode rows of values as one side of a cache stores them.

    Args:
        x: bfloat16, float16 or float32 ``[..., dim]``.
        mode: the mode of the side.
        scale: float32 scalar of a per-tensor mode; other modes ignore it.

    Returns:
        Codes ``[..., dim]`` of ``mode.code_dtype``, and their scales, float32 ``[...]``, or None unless the mode is
        per-token-head.
    """
    with np.errstate(all="ignore"):
        if mode.is_per_token_head:
            return _encode_per_token_head(x.astype(np.float32), mode)
        if mode.is_per_tensor:
            return _encode_per_tensor(x.astype(np.float32), mode, np.float32(scale)), None
        return _cast(x, mode.code_dtype), None


def decode_rows(codes: np.ndarray, mode: KVQuantMode, scales: float | np.ndarray | None) -> np.ndarray:
    """Return the float32 values ``[..., dim]`` that ``codes`` stand for.

    Args:
        codes: ``mode.code_dtype`` ``[..., dim]``.
        mode: the mode of the side.
        scales: float32 ``[...]`` of a per-token-head mode, a float32 scalar of a per-tensor mode; else ignored.
    """
    with np.errstate(all="ignore"):
        values = codes.astype(np.float32)
        if mode.is_quantized:
            values = values * np.asarray(scales, np.float32)[..., None]
        return values


def _encode_per_token_head(x: np.ndarray, mode: KVQuantMode) -> tuple[np.ndarray, np.ndarray]:
    qmax = np.float32(mode.qmax)
    magnitudes = x.view(np.uint32) & np.uint32(0x7FFFFFFF)
    absmax_bits = magnitudes.max(axis=-1)  # on bits: exact, independent of order, and NaN is the largest
    finite = absmax_bits < _INFINITY_BITS
    absmax = np.where(finite, absmax_bits, np.uint32(0)).view(np.float32)
    scales = np.maximum(absmax * (np.float32(1) / qmax), MIN_SCALE)
    inverses = np.float32(1) / scales
    y = np.where(finite[..., None], x, np.float32(0)) * inverses[..., None]
    codes = _round_to_codes(y, mode)
    return codes, np.where(finite, scales, _NAN)


def _encode_per_tensor(x: np.ndarray, mode: KVQuantMode, scale: np.float32) -> np.ndarray:
    y = x * (np.float32(1) / scale)
    return _with_nan(_round_to_codes(y, mode), ~np.isfinite(x) | np.isnan(y))


def _round_to_codes(y: np.ndarray, mode: KVQuantMode) -> np.ndarray:
    """Round to the nearest code, ties to even, saturating at ``mode.qmax``."""
    qmax = np.float32(mode.qmax)
    if mode.code_dtype == np.int8:
        y = np.rint(y)
    return np.clip(y, -qmax, qmax).astype(mode.code_dtype)


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    if x.dtype == dtype:
        return x.copy()
    return _with_nan(x.astype(np.float32).astype(dtype), np.isnan(x))


def _with_nan(codes: np.ndarray, is_nan: np.ndarray) -> np.ndarray:
    """``codes`` with the NaN of their dtype where ``is_nan``."""
    nan = _NAN_CODES[codes.dtype]
    return np.where(is_nan, nan, codes.view(nan.dtype)).view(codes.dtype)
