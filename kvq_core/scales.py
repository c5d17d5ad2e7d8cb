"""Per-tensor scales from the largest magnitudes that K and V were seen to have."""

from __future__ import annotations

import math
import numbers
from typing import Any

import numpy as np

from kvq_core.modes import KVQuantMode, parse_kv_cache_dtype

# Room for values twice as large as any seen. A power of two moves exponents only: it costs float8_e4m3fn no precision
# but that of values below 2**-13 of the largest, which become subnormal, and float8_e5m2 none above 2**-28.
DEFAULT_MARGIN = 2.0
NOTHING_SEEN = -1.0  # what a running absolute maximum starts from
_MIN_SCALE, _MAX_SCALE = 1e-30, 1e30  # within which every backend writes the same bytes


def kv_scales_from_absmax(
    kv_cache_dtype: str, k_absmax: float, v_absmax: float, *, margin: float = DEFAULT_MARGIN
) -> tuple[float, float]:
    """Return the ``k_scale`` and ``v_scale`` of a cache that holds values up to ``margin`` times those seen.

    ``scale = float32(absmax * margin / qmax)``, with qmax 448 (``fp8_e4m3``) or 57344 (``fp8_e5m2``). It is 1.0 where
    all values seen were zero (or the scale would be below 1e-30), and at most 1e30. ``kvq_torch.ScaleCalibrator`` and
    ``kvq_jax.ScaleCalibrator`` find the maxima on the device.

    Args:
        kv_cache_dtype: ``"fp8_e4m3"``, ``"fp8_e5m2"``, or a pair ``"K/V"`` with one of them, whose other side gets 1.0.
        k_absmax: the largest magnitude of K seen; negative if nothing was.
        v_absmax: the largest magnitude of V.
        margin: how much larger than any seen a value may be before it saturates.

    Returns:
        Two numbers that float32 holds exactly.

    Raises:
        TypeError: ``margin`` is no number.
        ValueError: neither side of ``kv_cache_dtype`` has a per-tensor scale, ``margin`` is not above 0 and finite, a
            maximum is NaN or infinite, or nothing was seen.
    """
    check_calibration(kv_cache_dtype, margin)
    k_mode, v_mode = parse_kv_cache_dtype(kv_cache_dtype)
    return _scale("K", k_mode, k_absmax, margin), _scale("V", v_mode, v_absmax, margin)


def check_calibration(kv_cache_dtype: str, margin: Any) -> None:
    """Raise unless scales can be derived for ``kv_cache_dtype`` with ``margin``: see `kv_scales_from_absmax`."""
    if not any(mode.is_per_tensor for mode in parse_kv_cache_dtype(kv_cache_dtype)):
        raise ValueError(
            f"expected fp8_e4m3 or fp8_e5m2 for K, V or both; got {kv_cache_dtype!r}, which has no per-tensor scale to "
            "calibrate"
        )
    if isinstance(margin, bool) or not isinstance(margin, numbers.Real):
        raise TypeError(f"expected margin to be a number; got {margin!r} ({type(margin).__name__})")
    if not 0 < float(margin) < math.inf:
        raise ValueError(f"expected margin to be finite and above 0; got {margin!r}. 1.0 leaves no room, 2.0 some")


def _scale(side: str, mode: KVQuantMode, absmax: float, margin: float) -> float:
    if not mode.is_per_tensor or mode.qmax is None:
        return 1.0
    if absmax < 0:
        raise ValueError(f"expected {side} to be observed at least once; got nothing to derive its scale from")
    if not math.isfinite(absmax):
        raise ValueError(
            f"expected finite {side}; got values whose largest magnitude is {absmax}. Find the batch or layer that "
            "overflows and calibrate without it"
        )
    scale = float(absmax) * float(margin) / mode.qmax
    return float(np.float32(min(scale, _MAX_SCALE))) if scale >= _MIN_SCALE else 1.0
