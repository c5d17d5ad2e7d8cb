"""Opt-in checks of values, which the ops never inspect (DESIGN.md section 6).

Each takes anything numpy can read and raises a ValueError that names the first offending index and its value.
They read the arrays, so on a device they synchronise: for debugging and for the edge of an engine, not for its loop.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def check_slot_mapping(slot_mapping: ArrayLike, num_pages: int, page_size: int) -> None:
    """Raise unless every slot is padding (negative) or a slot of the pool, and no two tokens share one.

    Args:
        slot_mapping: integers ``[num_tokens]``.
        num_pages: pages of the pool.
        page_size: tokens of a page.
    """
    slots = np.asarray(slot_mapping)
    capacity = num_pages * page_size
    _require(slots < capacity, slots, "slot_mapping", f"below num_pages * page_size = {capacity}")
    is_first = np.zeros(slots.shape, bool)
    is_first[np.unique(slots, return_index=True)[1]] = True
    _require(is_first | (slots < 0), slots, "slot_mapping", "not the slot of an earlier token")


def check_page_table(page_table: ArrayLike, seq_lens: ArrayLike, num_pages: int, page_size: int) -> None:
    """Raise unless every table entry that holds a token names a page of the pool, and the table holds every length.

    Args:
        page_table: integers ``[num_seqs, max_pages]``.
        seq_lens: integers ``[num_seqs]``.
        num_pages: pages of the pool.
        page_size: tokens of a page.
    """
    table, lengths = np.asarray(page_table), np.asarray(seq_lens)
    max_tokens = table.shape[1] * page_size
    _require(lengths >= 0, lengths, "seq_lens", "0 or more")
    _require(lengths <= max_tokens, lengths, "seq_lens", f"at most max_pages * page_size = {max_tokens}")
    is_used = np.arange(table.shape[1]) * page_size < lengths[:, None]
    is_page = (table >= 0) & (table < num_pages)
    _require(is_page | ~is_used, table, "page_table", f"a page id from 0 to {num_pages - 1}")


def check_page_ids(page_ids: ArrayLike, num_pages: int) -> None:
    """Raise unless every id, such as the ``src`` and ``dst`` of ``copy_pages``, names a page of the pool.

    Args:
        page_ids: integers of any shape.
        num_pages: pages of the pool.
    """
    ids = np.asarray(page_ids)
    _require((ids >= 0) & (ids < num_pages), ids, "page_ids", f"a page id from 0 to {num_pages - 1}")


def check_cu_seqlens_q(cu_seqlens_q: ArrayLike, num_q_tokens: int, max_seqlen_q: int | None = None) -> None:
    """Raise unless ``cu_seqlens_q`` starts at 0, never falls, and ends within the queries.

    Args:
        cu_seqlens_q: integers ``[num_seqs + 1]``.
        num_q_tokens: rows of q.
        max_seqlen_q: the promised bound on the queries of a sequence, checked if given.
    """
    bounds = np.asarray(cu_seqlens_q)
    counts = np.diff(bounds, prepend=0)
    _require((np.arange(len(bounds)) > 0) | (bounds == 0), bounds, "cu_seqlens_q", "0 first")
    _require(counts >= 0, bounds, "cu_seqlens_q", "no less than the entry before")
    _require(bounds <= num_q_tokens, bounds, "cu_seqlens_q", f"at most num_q_tokens = {num_q_tokens}")
    if max_seqlen_q is not None:
        wanted = f"at most max_seqlen_q = {max_seqlen_q} above the entry before"
        _require(counts <= max_seqlen_q, bounds, "cu_seqlens_q", wanted)


def check_scales(scales: ArrayLike) -> None:
    """Raise unless every per-tensor scale, such as ``k_scale`` and ``v_scale``, is finite, positive and invertible.

    Args:
        scales: float32 of any shape; a subnormal has no finite float32 reciprocal and is refused.
    """
    values = np.asarray(scales, np.float32)
    smallest = np.finfo(np.float32).tiny
    _require(np.isfinite(values) & (values >= smallest), values, "scales", f"finite and at least {smallest}")


def _require(is_good: np.ndarray, values: np.ndarray, name: str, wanted: str) -> None:
    if is_good.all():
        return
    index = tuple(int(i) for i in np.argwhere(~is_good)[0])
    element = f"{name}[{', '.join(map(str, index))}]" if index else name
    raise ValueError(f"expected {element} to be {wanted}; got {values[index]}")
