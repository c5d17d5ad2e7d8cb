"""The KV cache of one layer: its pages, its layout and its per-tensor scales."""

from __future__ import annotations

import operator
from typing import Any

import torch

from kvq_core.arguments import _check_pages, pages_alignment
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_torch._interop import array_spec


class KVCache:
    """The KV cache of one layer. Make it outside compiled functions: its checks look at addresses.

    Args:
        layout: the byte layout of the pages, a `CacheLayout` or an `MLALayout`.
        num_pages: how many pages to allocate, all zero; exclusive with ``pages``.
        pages: an existing pool to wrap, uint8 with the axes of the layout. It is neither copied nor cleared. The
            records of a page are contiguous; the page stride may be larger, so that layers share a tensor. In a row
            container only rows are contiguous: their strides are free, so that it may be a view with its axes in any
            order. The number of KV heads may be a shard that divides ``layout.num_kv_heads``.
        device: where to allocate; the device of ``pages`` if wrapped, else torch's default.
        k_scale: the scale of K in a per-tensor mode (``x = code * scale``), a number or a tensor of one element. A
            float32 tensor on the device is kept, not copied. Other modes ignore it.
        v_scale: the scale of V.

    Attributes:
        layout: the byte layout.
        fingerprint: ``layout.fingerprint()``, the form in which ops carry the layout.
        pages: uint8 ``[num_pages, num_kv_heads, record_bytes]``, or the axes of a row container.
        k_scale, v_scale: float32 tensors without axes on the device of ``pages``.

    Raises:
        TypeError: ``pages`` is no uint8 tensor, or ``num_pages`` no integer.
        ValueError: neither or both of ``num_pages`` and ``pages`` are given; a shape, stride, alignment or device is
            not as above.
    """

    def __init__(
        self,
        layout: CacheLayout | MLALayout,
        num_pages: int | None = None,
        *,
        pages: torch.Tensor | None = None,
        device: torch.device | str | int | None = None,
        k_scale: float | torch.Tensor = 1.0,
        v_scale: float | torch.Tensor = 1.0,
    ) -> None:
        if (num_pages is None) == (pages is None):
            raise ValueError(
                "expected exactly one of num_pages (allocates) and pages (wraps a tensor); "
                f"got {'neither' if pages is None else 'both'}"
            )
        if pages is None:
            pages = torch.zeros(layout.shape(_page_count(num_pages)), dtype=torch.uint8, device=device)
        else:
            _check_wrapped(layout, pages, device)
        self.layout = layout
        self.fingerprint = layout.fingerprint()
        self.pages = pages
        self.k_scale = _scale_tensor("k_scale", k_scale, pages.device)
        self.v_scale = _scale_tensor("v_scale", v_scale, pages.device)

    @property
    def num_pages(self) -> int:
        """Pages in the pool."""
        return self.pages.shape[0]

    def __repr__(self) -> str:
        return f"KVCache({self.fingerprint}, num_pages={self.num_pages}, device={str(self.pages.device)!r})"


def _page_count(num_pages: Any) -> int:
    count = operator.index(num_pages)
    if count < 1:
        raise ValueError(f"expected num_pages to be an integer from 1; got {num_pages}")
    return count


def _check_wrapped(layout: CacheLayout | MLALayout, pages: Any, device: torch.device | str | int | None) -> None:
    if not isinstance(pages, torch.Tensor):
        raise TypeError(f"expected pages to be a torch.Tensor; got {type(pages).__name__}. Try torch.from_dlpack")
    spec = array_spec(pages)
    _check_pages(spec, layout)
    if device is not None and _with_index(torch.device(device)) != pages.device:
        raise ValueError(f"expected pages on device {str(device)!r}; got {str(pages.device)!r}. Leave device out")
    alignment = pages_alignment(spec)
    if pages.data_ptr() % alignment:
        raise ValueError(
            f"expected pages to start at a multiple of {alignment} bytes, as their strides are; got address "
            f"{pages.data_ptr():#x}. Slice the pool at whole pages or allocate it with torch"
        )


def _with_index(device: torch.device) -> torch.device:
    """``cuda`` as ``cuda:0``, the way tensors spell their device."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _scale_tensor(name: str, scale: float | torch.Tensor, device: torch.device) -> torch.Tensor:
    tensor = torch.as_tensor(scale, dtype=torch.float32, device=device)
    if tensor.numel() != 1:
        raise ValueError(f"expected {name} to be a number or a tensor of one element; got shape {list(tensor.shape)}")
    return tensor.reshape(())
