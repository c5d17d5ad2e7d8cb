"""Calibration: the per-tensor scales of a layer from the K and V that pass by."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import lax

from kvq_core.arguments import FLOAT_DTYPES
from kvq_core.scales import DEFAULT_MARGIN, NOTHING_SEEN, check_calibration, kv_scales_from_absmax
from kvq_jax._interop import Array, as_jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ScaleCalibrator:
    """A running absolute maximum of the K and V of one layer, and the scales that follow from it.

        calibrator = ScaleCalibrator.create("fp8_e4m3")
        for batch in batches:
            ...
            calibrator = calibrator.observe(k, v)    # inside jit and scan too: it is a pytree
        k_scale, v_scale = calibrator.scales()
        cache = KVCache.create(layout, num_pages, k_scale=k_scale, v_scale=v_scale)

    Args:
        k_absmax: float32 ``[]``, negative before the first observation.
        v_absmax: float32 ``[]``.
        kv_cache_dtype: static; see `create`.
        margin: static.
    """

    k_absmax: jax.Array
    v_absmax: jax.Array
    kv_cache_dtype: str = field(metadata={"static": True})
    margin: float = field(metadata={"static": True})

    @classmethod
    def create(cls, kv_cache_dtype: str, *, margin: float = DEFAULT_MARGIN) -> ScaleCalibrator:
        """Return a calibrator that has seen nothing.

        Args:
            kv_cache_dtype: ``"fp8_e4m3"``, ``"fp8_e5m2"``, or a pair ``"K/V"`` with one of them, such as
                ``layout.kv_cache_dtype``.
            margin: how much larger than any seen a value may be before it saturates; ``absmax * margin / qmax`` is the
                scale. As a power of two it costs no precision but that of the smallest values.

        Raises:
            TypeError, ValueError: see `kvq_core.kv_scales_from_absmax`.
        """
        check_calibration(kv_cache_dtype, margin)
        return cls(jnp.float32(NOTHING_SEEN), jnp.float32(NOTHING_SEEN), kv_cache_dtype, margin)

    def observe(self, k: Array, v: Array) -> ScaleCalibrator:
        """Return the calibrator that has also seen these values, as ``append_kv`` would get them.

        Args:
            k: bfloat16, float16 or float32 of any shape; without elements it counts as nothing.
            v: the same.

        Raises:
            TypeError: an argument is no array of such a dtype.
        """
        k_absmax, v_absmax = _raised("k", self.k_absmax, k), _raised("v", self.v_absmax, v)
        return replace(self, k_absmax=k_absmax, v_absmax=v_absmax)

    def scales(self) -> tuple[float, float]:
        """Return ``k_scale`` and ``v_scale``; a side without a per-tensor scale, or of zeros only, has 1.0.

        It reads two numbers back, so it belongs outside ``jit``.

        Raises:
            ValueError: nothing was observed, or a value that is NaN or infinite.
        """
        absmax = float(self.k_absmax), float(self.v_absmax)
        return kv_scales_from_absmax(self.kv_cache_dtype, *absmax, margin=self.margin)


def _raised(name: str, absmax: jax.Array, values: Array) -> jax.Array:
    """The larger of ``absmax`` and the largest magnitude in ``values``; NaN stays."""
    x = as_jax(name, values)
    if x.dtype.name not in FLOAT_DTYPES:
        raise TypeError(f"expected {name} of dtype {' or '.join(FLOAT_DTYPES)}; got {x.dtype.name}")
    if not x.size:
        return absmax
    # On bits, where NaN is the largest: XLA's maximum over many float32 drops it on a CPU.
    bits = (lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32) & 0x7FFFFFFF).max()
    return jnp.maximum(absmax, lax.bitcast_convert_type(bits, jnp.float32))
