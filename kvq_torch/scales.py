"""Calibration: the per-tensor scales of a layer from the K and V that pass by."""

from __future__ import annotations

import torch

from kvq_core.arguments import FLOAT_DTYPES
from kvq_core.scales import DEFAULT_MARGIN, NOTHING_SEEN, check_calibration, kv_scales_from_absmax
from kvq_torch._interop import dtype_name


class ScaleCalibrator:
    """A running absolute maximum of the K and V of one layer, and the scales that follow from it.

        calibrator = ScaleCalibrator("fp8_e4m3", device="cuda")
        for batch in batches:
            ...
            calibrator.observe(k, v)
        k_scale, v_scale = calibrator.scales()
        cache = KVCache(layout, num_pages, device="cuda", k_scale=k_scale, v_scale=v_scale)

    ``observe`` never waits for the device and may be captured by a CUDA graph; ``scales`` reads two numbers back.

    Args:
        kv_cache_dtype: ``"fp8_e4m3"``, ``"fp8_e5m2"``, or a pair ``"K/V"`` with one of them, such as
            ``layout.kv_cache_dtype``.
        margin: how much larger than any seen a value may be before it saturates; ``absmax * margin / qmax`` is the
            scale. As a power of two it costs no precision but that of the smallest values.
        device: where K and V will be; torch's default if None.

    Attributes:
        k_absmax, v_absmax: float32 tensors without axes, negative before the first observation.

    Raises:
        TypeError, ValueError: see `kvq_core.kv_scales_from_absmax`.
    """

    def __init__(
        self,
        kv_cache_dtype: str,
        *,
        margin: float = DEFAULT_MARGIN,
        device: torch.device | str | int | None = None,
    ) -> None:
        check_calibration(kv_cache_dtype, margin)
        self.kv_cache_dtype = kv_cache_dtype
        self.margin = margin
        self.k_absmax = torch.full((), NOTHING_SEEN, dtype=torch.float32, device=device)
        self.v_absmax = torch.full((), NOTHING_SEEN, dtype=torch.float32, device=device)

    def observe(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Take in values as ``append_kv_`` would get them.

        Args:
            k: bfloat16, float16 or float32 of any shape; without elements it counts as nothing.
            v: the same.

        Raises:
            TypeError: an argument is no tensor of such a dtype.
            ValueError: it lies on another device.
        """
        _check_values("k", k, self.k_absmax.device)
        _check_values("v", v, self.v_absmax.device)
        _raise_to_absmax(self.k_absmax, k)
        _raise_to_absmax(self.v_absmax, v)

    def scales(self) -> tuple[float, float]:
        """Return ``k_scale`` and ``v_scale``; a side without a per-tensor scale, or of zeros only, has 1.0.

        Raises:
            ValueError: nothing was observed, or a value that is NaN or infinite.
        """
        absmax = self.k_absmax.item(), self.v_absmax.item()
        return kv_scales_from_absmax(self.kv_cache_dtype, *absmax, margin=self.margin)


def _raise_to_absmax(absmax: torch.Tensor, x: torch.Tensor) -> None:
    """Raise ``absmax`` in place to the largest magnitude in ``x``; NaN stays."""
    if x.numel():
        low, high = x.detach().aminmax()
        absmax.copy_(torch.maximum(absmax, torch.maximum(-low, high).float()))


def _check_values(name: str, x: object, device: torch.device) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor; got {type(x).__name__}")
    if dtype_name(x.dtype) not in FLOAT_DTYPES:
        raise TypeError(f"expected {name} of dtype {' or '.join(FLOAT_DTYPES)}; got {dtype_name(x.dtype)}")
    if x.device != device:
        raise ValueError(
            f"expected {name} on the device of the calibrator, {str(device)!r}; got {str(x.device)!r}. "
            f"Make it with device={str(x.device)!r}"
        )
