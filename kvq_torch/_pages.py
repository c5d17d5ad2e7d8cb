"""Pages as torch views: the rows of a field, and the values of gathered pages."""

from __future__ import annotations

import torch

from kvq_core.layout import CacheLayout
from kvq_torch._codec import decode_rows


def field_rows(layout: CacheLayout, records: torch.Tensor, name: str) -> torch.Tensor:
    """The rows of one field of pages, which end in the axes of ``layout``, as a view.

    Returns:
        uint8 ``[..., num_kv_heads, page_size, row_bytes]``.
    """
    field = layout.fields[name]
    if layout.has_rows:
        return records.transpose(-3, layout.head_axis - 4).narrow(-1, field.offset, field.row_bytes)
    field_bytes = records.narrow(-1, field.offset, layout.page_size * field.row_bytes)
    return field_bytes.unflatten(-1, (layout.page_size, field.row_bytes))


def read_pages(
    layout: CacheLayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pages back as values.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``.
        k_scale: float32 ``[]``, the scale of K in a per-tensor mode.
        v_scale: float32 ``[]``, the scale of V in a per-tensor mode.
        page_ids: an integer dtype ``[num_seqs, n]``.

    Returns:
        float32 K ``[num_seqs, n, num_kv_heads, page_size, head_dim]`` and V with ``head_dim_v``; NaN for a page outside
        the pool.
    """
    if pages.shape[0] == 0:
        pages = pages.new_zeros((1, *pages.shape[1:]))
        page_ids = torch.full_like(page_ids, -1)
    inside = is_page(page_ids, pages)
    records = pages[torch.where(inside, page_ids, 0).long()]
    sides = []
    for side, mode, scales in (("k", layout.k_mode, k_scale), ("v", layout.v_mode, v_scale)):
        if mode.is_per_token_head:
            scales = field_rows(layout, records, f"{side}_scales").view(torch.float32)
        values = decode_rows(field_rows(layout, records, f"{side}_codes"), mode, scales)
        sides.append(torch.where(inside[..., None, None, None], values, torch.nan))
    return sides[0], sides[1]


def is_page(page_ids: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
    """Which ids name a page of the pool."""
    return (page_ids >= 0) & (page_ids < pages.shape[0])
