"""The arithmetic of the byte format in vectorised torch: rows of values to bytes, and back (DESIGN.md section 4).

Every step is an operation of its own, so that nothing contracts into a fused multiply-add.
"""

from __future__ import annotations

import numpy as np
import torch

from kvq_core.modes import KVQuantMode
from kvq_torch._interop import torch_dtype

_INFINITY_BITS = 0x7F800000
_NAN_SCALE_BITS = 0x7FC00000
_MIN_SCALE = 1e-6
# Casts of NaN differ between frameworks, so these bytes are written, never computed.
_NAN_CODES = {
    torch.float8_e4m3fn: (torch.uint8, 0x7F),
    torch.float8_e5m2: (torch.uint8, 0x7E),
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
}


def encode_rows(x: torch.Tensor, mode: KVQuantMode, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Encode rows as one side of a cache stores them.

    Args:
        x: bfloat16, float16 or float32 ``[..., dim]``, contiguous.
        mode: the mode of the side.
        scale: float32 ``[]`` of a per-tensor mode; other modes ignore it.

    Returns:
        The bytes of the codes, uint8 ``[..., row_bytes]``, and those of their scales, uint8 ``[..., 4]``, or None
        unless the mode is per-token-head.
    """
    if mode.is_per_token_head:
        return _encode_per_token_head(x.float(), mode)
    if mode.is_per_tensor:
        return _encode_per_tensor(x.float(), mode, scale), None
    return _cast(x, torch_dtype(mode.value)), None


def decode_rows(codes: torch.Tensor, mode: KVQuantMode, scales: torch.Tensor) -> torch.Tensor:
    """Return the float32 values ``[..., dim]`` of the bytes of codes.

    Args:
        codes: uint8 ``[..., row_bytes]``.
        mode: the mode of the side.
        scales: float32, ``[..., 1]`` of a per-token-head mode, ``[]`` of a per-tensor mode; else ignored.
    """
    values = codes.view(torch_dtype(mode.code_dtype.name)).float()
    return values * scales if mode.is_quantized else values


def _encode_per_token_head(x: torch.Tensor, mode: KVQuantMode) -> tuple[torch.Tensor, torch.Tensor]:
    absmax_bits = (x.view(torch.int32) & 0x7FFFFFFF).amax(-1, keepdim=True)  # on bits: exact, and NaN is the largest
    finite = absmax_bits < _INFINITY_BITS
    absmax = torch.where(finite, absmax_bits, 0).view(torch.float32)
    scales = (absmax * float(np.float32(1) / np.float32(mode.qmax))).clamp(min=_MIN_SCALE)
    y = torch.where(finite, x, 0.0) * scales.reciprocal()
    scale_bits = torch.where(finite, scales.view(torch.int32), _NAN_SCALE_BITS)
    return _round_to_codes(y, mode).view(torch.uint8), scale_bits.view(torch.uint8)


def _encode_per_tensor(x: torch.Tensor, mode: KVQuantMode, scale: torch.Tensor) -> torch.Tensor:
    y = x * scale.reciprocal()
    return _with_nan(_round_to_codes(y, mode), ~x.isfinite() | y.isnan())


def _round_to_codes(y: torch.Tensor, mode: KVQuantMode) -> torch.Tensor:
    """Round to the nearest code, ties to even, saturating at ``mode.qmax``."""
    dtype, qmax = torch_dtype(mode.code_dtype.name), float(mode.qmax or 0)
    if dtype == torch.int8:
        y = y.round()
    return y.clamp(-qmax, qmax).to(dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if x.dtype == dtype:
        return x.view(torch.uint8)
    return _with_nan(x.to(dtype), x.isnan())


def _with_nan(codes: torch.Tensor, is_nan: torch.Tensor) -> torch.Tensor:
    """The bytes of ``codes``, with the NaN of their dtype where ``is_nan``."""
    bits_dtype, nan = _NAN_CODES[codes.dtype]
    return torch.where(is_nan, nan, codes.view(bits_dtype)).view(torch.uint8)
