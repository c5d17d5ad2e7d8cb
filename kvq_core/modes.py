"""The storage modes of a KV cache: names, code dtypes, where the scale lives."""

from __future__ import annotations

import enum
from typing import NamedTuple

import ml_dtypes
import numpy as np


class _Mode(NamedTuple):
    code_dtype: np.dtype
    qmax: float | None
    scale_source: str  # "token_head": a float32 per row in the record; "tensor": held by the cache; "none"


_MODES = {
    "bfloat16": _Mode(np.dtype(ml_dtypes.bfloat16), None, "none"),
    "float16": _Mode(np.dtype(np.float16), None, "none"),
    "float32": _Mode(np.dtype(np.float32), None, "none"),
    "fp8_e4m3": _Mode(np.dtype(ml_dtypes.float8_e4m3fn), 448.0, "tensor"),
    "fp8_e5m2": _Mode(np.dtype(ml_dtypes.float8_e5m2), 57344.0, "tensor"),
    "int8_per_token_head": _Mode(np.dtype(np.int8), 127.0, "token_head"),
    "fp8_per_token_head": _Mode(np.dtype(ml_dtypes.float8_e4m3fn), 448.0, "token_head"),
}
_ALIASES = {"fp8": "fp8_e4m3"}


class KVQuantMode(enum.Enum):
    """How one side (K or V) of a KV cache is stored; one member per canonical mode name.

    The names are those of vLLM's ``--kv-cache-dtype``.
    """

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"
    FP8_E4M3 = "fp8_e4m3"
    FP8_E5M2 = "fp8_e5m2"
    INT8_PER_TOKEN_HEAD = "int8_per_token_head"
    FP8_PER_TOKEN_HEAD = "fp8_per_token_head"

    @property
    def code_dtype(self) -> np.dtype:
        """The numpy (ml_dtypes) dtype of one stored code, e.g. ``float8_e4m3fn``."""
        return _MODES[self.value].code_dtype

    @property
    def bits(self) -> int:
        """Bits of one stored code."""
        return 8 * self.code_dtype.itemsize

    @property
    def qmax(self) -> float | None:
        """The largest code magnitude (127, 448 or 57344); None for unquantized modes."""
        return _MODES[self.value].qmax

    @property
    def is_per_token_head(self) -> bool:
        """Whether every row carries its own float32 scale in the record."""
        return _MODES[self.value].scale_source == "token_head"

    @property
    def is_per_tensor(self) -> bool:
        """Whether one float32 scale per layer, held by the cache, serves all rows."""
        return _MODES[self.value].scale_source == "tensor"

    @property
    def is_quantized(self) -> bool:
        """Whether codes differ from the values they stand for by a scale."""
        return self.qmax is not None


def get_kv_quant_mode(name: str | KVQuantMode) -> KVQuantMode:
    """Return the mode called ``name``; ``"fp8"`` is ``"fp8_e4m3"``.

    Raises:
        ValueError: ``name`` is no mode, or is a pair ``"K/V"`` (see `parse_kv_cache_dtype`).
    """
    if isinstance(name, KVQuantMode):
        return name
    canonical = _ALIASES.get(name, name)
    if canonical in _MODES:
        return KVQuantMode(canonical)
    hint = "; a pair goes through parse_kv_cache_dtype" if "/" in str(name) else ""
    raise ValueError(f"expected a KV cache mode, one of {sorted([*_MODES, *_ALIASES])}; got {name!r}{hint}")


def parse_kv_cache_dtype(kv_cache_dtype: str) -> tuple[KVQuantMode, KVQuantMode]:
    """Return the modes of K and of V named by ``"K/V"``; ``"x"`` means ``"x/x"``.

    Raises:
        ValueError: more than one ``/``, or a side is no mode.
    """
    sides = str(kv_cache_dtype).split("/")
    if len(sides) > 2:
        raise ValueError(f"expected 'mode' or 'K mode/V mode'; got {kv_cache_dtype!r} with {len(sides)} parts")
    return get_kv_quant_mode(sides[0]), get_kv_quant_mode(sides[-1])


def kv_cache_uses_per_token_head_scales(kv_cache_dtype: str) -> bool:
    """Return whether K, V or both of ``kv_cache_dtype`` carry one scale per token and KV head.

    Raises:
        ValueError: a side is no mode.
    """
    return any(mode.is_per_token_head for mode in parse_kv_cache_dtype(kv_cache_dtype))
