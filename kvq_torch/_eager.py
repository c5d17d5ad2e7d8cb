"""The ops in vectorised torch: what a CPU runs, and what the kernels are compared with on a GPU.

No step reads a value back to the host, so that a GPU never stalls and a CUDA graph can hold the calls. Rows that must
not be written are redirected instead of masked out, because a boolean index would have to be counted on the host.
"""

from __future__ import annotations

import torch

from kvq_core.arguments import check_append_kv, check_copy_pages, check_gather_kv
from kvq_core.layout import CacheLayout
from kvq_torch._codec import encode_rows
from kvq_torch._eager_attention import mla_attention, paged_attention
from kvq_torch._interop import array_spec, dtype_name
from kvq_torch._pages import field_rows, is_page, read_pages

__all__ = ["append_kv_", "copy_pages_", "gather_kv", "mla_attention", "paged_attention"]


def append_kv_(
    layout: CacheLayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `kvq_torch.append_kv_`."""
    check_append_kv(layout, array_spec(pages), array_spec(k), array_spec(v), array_spec(slot_mapping))
    capacity = pages.shape[0] * layout.page_size
    if capacity == 0 or slot_mapping.shape[0] == 0:
        return
    any_kept, slots, tokens = _resolve_slots(slot_mapping.long(), capacity)
    page_ids, offsets = slots // layout.page_size, slots % layout.page_size
    for side, x, mode, scale in (("k", k, layout.k_mode, k_scale), ("v", v, layout.v_mode, v_scale)):
        codes, scales = encode_rows(x.index_select(0, tokens), mode, scale)
        for name, values in ((f"{side}_codes", codes), (f"{side}_scales", scales)):
            if values is not None:
                rows = field_rows(layout, pages, name).transpose(1, 2)
                rows[page_ids, offsets] = torch.where(any_kept, values, rows[page_ids, offsets])


def gather_kv(
    layout: CacheLayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvq_torch.gather_kv`."""
    check_gather_kv(layout, array_spec(pages), array_spec(page_table), array_spec(seq_lens), dtype_name(dtype))
    num_tokens = page_table.shape[1] * layout.page_size
    is_token = torch.arange(num_tokens, device=pages.device) < seq_lens[:, None]
    k, v = read_pages(layout, pages, k_scale, v_scale, page_table)

    def dense(values: torch.Tensor) -> torch.Tensor:
        rows = values.transpose(2, 3).flatten(1, 2)
        return torch.where(is_token[:, :, None, None], rows, 0.0).to(dtype)

    return dense(k), dense(v)


def copy_pages_(pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """See `kvq_torch.copy_pages_`."""
    check_copy_pages(array_spec(pages), array_spec(src), array_spec(dst))
    if pages.shape[0] == 0 or src.shape[0] == 0:
        return
    is_kept = is_page(src, pages) & is_page(dst, pages)
    kept = _any_index(is_kept)
    # A skipped pair repeats a kept one; if all are skipped, page 0 is copied to itself.
    src, dst = (torch.where(is_kept, ids, torch.where(is_kept[kept], ids[kept], 0)).long() for ids in (src, dst))
    pages[dst] = pages[src]


def _resolve_slots(slots: torch.Tensor, capacity: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decide which token each of the writes to ``slots`` carries, so that equal slots carry equal rows.

    Returns:
        Whether any slot lies in the pool, bool ``[]``; slots in the pool and the token of each, int64 ``[num_tokens]``.
        A dropped slot repeats one that is kept.
    """
    is_kept = (slots >= 0) & (slots < capacity)
    kept = _any_index(is_kept)
    slots = torch.where(is_kept, slots, slots[kept]).clamp(0, capacity - 1)
    winners = torch.empty(capacity, dtype=torch.int64, device=slots.device)
    winners[slots] = torch.where(is_kept, torch.arange(slots.shape[0], device=slots.device), kept)
    return is_kept.any(), slots, winners[slots]


def _any_index(mask: torch.Tensor) -> torch.Tensor:
    """The index of a true element, int64 ``[1]``; 0 if there is none. One axis, as an index without axes would sync."""
    return mask.byte().argmax(0, keepdim=True)
