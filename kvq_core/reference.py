"""The specification, in numpy: what every backend computes (DESIGN.md sections 3 to 6).

Written to be read, not to be fast. Cache bytes agree with it exactly, attention as DESIGN.md section 4 says. Arrays are
numpy's, with the dtypes of ml_dtypes where numpy has none; a pool whose page stride exceeds a page is a strided view,
as is a row container in whatever order of its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvq_core.arguments import (
    FLOAT_DTYPES,
    ArraySpec,
    AttentionCall,
    check_append_kv,
    check_copy_pages,
    check_gather_kv,
    check_merge_states,
    check_paged_attention,
)
from kvq_core.codec import decode_rows, encode_rows
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_append_mla, check_gather_mla, check_mla_attention

_QUERY_TILE = 64  # bounds the memory of the scores


def record_field(layout: CacheLayout | MLALayout, pages: np.ndarray, name: str) -> np.ndarray:
    """Return one field of all records as a writable view.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``.
        name: a key of ``layout.fields``, e.g. ``"k_codes"``.

    Returns:
        ``[num_pages, num_kv_heads, page_size, n]`` of the field's dtype; n is the head dimension of codes, 1 of scales.
    """
    field = layout.fields[name]
    if layout.has_rows:
        rows = pages.swapaxes(1, layout.head_axis)[..., field.offset : field.offset + field.row_bytes]
    else:
        field_bytes = pages[:, :, field.offset : field.offset + layout.page_size * field.row_bytes]
        rows = field_bytes.reshape(*pages.shape[:2], layout.page_size, field.row_bytes)
    return rows.view(field.dtype)


def append_kv(
    layout: CacheLayout,
    pages: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slot_mapping: np.ndarray,
    k_scale: float | np.ndarray = 1.0,
    v_scale: float | np.ndarray = 1.0,
) -> None:
    """Quantize new tokens and write them to their slots, in place.

    A slot below 0, or past the pool, drops its token. Of tokens with the same slot one wins whole.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``, written.
        k: bfloat16, float16 or float32 ``[num_tokens, num_kv_heads, head_dim]``.
        v: the same with ``head_dim_v``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        k_scale: float32 scalar of a per-tensor mode of K.
        v_scale: float32 scalar of a per-tensor mode of V.

    Raises:
        TypeError, ValueError: see `kvq_core.arguments.check_append_kv`.
    """
    check_append_kv(layout, _spec(pages), _spec(k), _spec(v), _spec(slot_mapping))
    is_kept = (slot_mapping >= 0) & (slot_mapping < pages.shape[0] * layout.page_size)
    page_ids, offsets = np.divmod(slot_mapping[is_kept], layout.page_size)
    for side, x, mode, scale in (("k", k, layout.k_mode, k_scale), ("v", v, layout.v_mode, v_scale)):
        codes, scales = encode_rows(x[is_kept], mode, scale)
        record_field(layout, pages, f"{side}_codes")[page_ids, :, offsets] = codes
        if scales is not None:
            record_field(layout, pages, f"{side}_scales")[page_ids, :, offsets] = scales[..., None]


def gather_kv(
    layout: CacheLayout,
    pages: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    k_scale: float | np.ndarray = 1.0,
    v_scale: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Read sequences back as dense values.

    Args:
        layout: the layout of ``pages``.
        pages: uint8, the axes of ``layout``.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        k_scale: float32 scalar of a per-tensor mode of K.
        v_scale: float32 scalar of a per-tensor mode of V.

    Returns:
        K ``[num_seqs, max_pages * page_size, num_kv_heads, head_dim]`` and V with ``head_dim_v``, float32: zero at and
        past each length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError: see `kvq_core.arguments.check_gather_kv`.
    """
    check_gather_kv(layout, _spec(pages), _spec(page_table), _spec(seq_lens), "float32")
    is_token = np.arange(page_table.shape[1] * layout.page_size) < seq_lens[:, None]
    k, v = _read_pages(layout, pages, page_table, k_scale, v_scale)
    is_token = is_token[:, :, None, None]
    return np.where(is_token, k, np.float32(0)), np.where(is_token, v, np.float32(0))


def copy_pages(pages: np.ndarray, src: np.ndarray, dst: np.ndarray) -> None:
    """Copy page ``src[i]`` to page ``dst[i]``, in place; all sources are read before any is written.

    A pair with an id outside the pool is skipped.

    Args:
        pages: uint8, the axes of any layout, written.
        src: int32 or int64 ``[num_pairs]``.
        dst: int32 or int64 ``[num_pairs]``, unique and disjoint from ``src``.

    Raises:
        TypeError, ValueError: see `kvq_core.arguments.check_copy_pages`.
    """
    check_copy_pages(_spec(pages), _spec(src), _spec(dst))
    is_kept = _is_page(src, pages) & _is_page(dst, pages)
    pages[dst[is_kept]] = pages[src[is_kept]]


@np.errstate(all="ignore")
def paged_attention(
    layout: CacheLayout,
    q: np.ndarray,
    pages: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    cu_seqlens_q: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: np.ndarray | None = None,
    alibi_slopes: np.ndarray | None = None,
    k_scale: float | np.ndarray = 1.0,
    v_scale: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend over the cached values, ``softmax(sm_scale * q k^T + mask) v``, in float64.

    Query i of a sequence's n queries sits at position ``p = seq_len - n + i`` and sees key j when ``j <= p`` (causal)
    and ``j > p - window``. Its score is ``s = sm_scale * q k_j``, then ``softcap * tanh(s / softcap)``, then
    ``+ slope * (j - p)``. A query that sees a key on a page outside the pool, or past the page table, gets NaN.

    Args:
        layout: the layout of ``pages``.
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_q_heads, head_dim]``.
        pages: uint8, the axes of ``layout``.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: the caller's promise of the most queries of a sequence; without effect here.
        sm_scale: multiplies the scores; ``head_dim**-0.5`` if None.
        causal: whether a query sees no later key.
        window: how many keys up to its position a query sees; None for all.
        softcap: bounds the scores; None for no bound.
        sinks: float32 ``[num_q_heads]``, logits that join the denominator only.
        alibi_slopes: float32 ``[num_q_heads]``.
        k_scale: float32 scalar of a per-tensor mode of K.
        v_scale: float32 scalar of a per-tensor mode of V.

    Returns:
        Values ``[num_q_tokens, num_q_heads, head_dim_v]`` and log-sum-exp ``[num_q_tokens, num_q_heads]`` (natural,
        sinks included), float64. A query that sees no key: zeros, and -inf or the sink. Rows from ``cu_seqlens_q[-1]``
        on: zeros, and -inf.

    Raises:
        TypeError, ValueError: see `kvq_core.arguments.check_paged_attention`.
    """
    call = AttentionCall(
        *map(_spec, (q, pages, page_table, seq_lens)),
        *map(_optional_spec, (cu_seqlens_q, sinks, alibi_slopes)),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    check_paged_attention(layout, call)
    num_kv_heads = pages.shape[layout.head_axis]
    heads = (num_kv_heads, q.shape[1] // num_kv_heads)  # query head h reads KV head h // heads[1]
    scoring = _Scoring(
        sm_scale=call.score_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        slopes=_per_head(alibi_slopes, heads, default=0.0),
        sinks=_per_head(sinks, heads, default=-np.inf),
    )
    return _attend_sequences(scoring, layout, q, pages, page_table, seq_lens, cu_seqlens_q, (k_scale, v_scale))


def append_mla(
    layout: MLALayout,
    pages: np.ndarray,
    kv_c: np.ndarray,
    k_pe: np.ndarray,
    slot_mapping: np.ndarray,
    k_scale: float | np.ndarray = 1.0,
) -> None:
    """Quantize new tokens of an MLA cache and write them to their slots, in place; rules as `append_kv`.

    Args:
        layout: the layout of ``pages``.
        pages: uint8 ``[num_pages, 1, record_bytes]``, written.
        kv_c: the latents, bfloat16, float16 or float32 ``[num_tokens, kv_lora_rank]``.
        k_pe: the rope parts, the same with ``rope_dim``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        k_scale: float32 scalar of a per-tensor mode, of both parts.

    Raises:
        TypeError, ValueError: see `kvq_core.mla_arguments.check_append_mla`.
    """
    check_append_mla(layout, _spec(pages), _spec(kv_c), _spec(k_pe), _spec(slot_mapping))
    append_kv(layout.records, pages, kv_c[:, None], k_pe[:, None], slot_mapping, k_scale, k_scale)


def gather_mla(
    layout: MLALayout,
    pages: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    k_scale: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Read sequences of an MLA cache back as dense values.

    Args:
        layout: the layout of ``pages``.
        pages: uint8 ``[num_pages, 1, record_bytes]``.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        k_scale: float32 scalar of a per-tensor mode, of both parts.

    Returns:
        Latents ``[num_seqs, max_pages * page_size, kv_lora_rank]`` and rope parts with ``rope_dim``, float32: zero at
        and past each length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError: see `kvq_core.mla_arguments.check_gather_mla`.
    """
    check_gather_mla(layout, _spec(pages), _spec(page_table), _spec(seq_lens))
    latent, rope = gather_kv(layout.records, pages, page_table, seq_lens, k_scale, k_scale)
    return latent[:, :, 0], rope[:, :, 0]


@np.errstate(all="ignore")
def mla_attention(
    layout: MLALayout,
    q: np.ndarray,
    pages: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    *,
    sm_scale: float,
    cu_seqlens_q: np.ndarray | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    k_scale: float | np.ndarray = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend over the cached latents: `paged_attention` where a key is ``[latent | rope]`` and its value the latent.

    Args:
        layout: the layout of ``pages``.
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_heads, kv_lora_rank + rope_dim]``.
        pages: uint8 ``[num_pages, 1, record_bytes]``.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        sm_scale: multiplies the scores.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: the caller's promise of the most queries of a sequence; without effect here.
        causal: whether a query sees no later key.
        k_scale: float32 scalar of a per-tensor mode, of both parts.

    Returns:
        Values ``[num_q_tokens, num_heads, kv_lora_rank]`` and log-sum-exp ``[num_q_tokens, num_heads]``, float64.

    Raises:
        TypeError, ValueError: see `kvq_core.mla_arguments.check_mla_attention`.
    """
    call = AttentionCall(
        *map(_spec, (q, pages, page_table, seq_lens)),
        cu_seqlens_q=_optional_spec(cu_seqlens_q),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
    )
    check_mla_attention(layout, call)
    heads = (1, q.shape[1])
    no_slopes, no_sinks = _per_head(None, heads, default=0.0), _per_head(None, heads, default=-np.inf)
    scoring = _Scoring(sm_scale, causal, window=None, softcap=None, slopes=no_slopes, sinks=no_sinks)
    return _attend_sequences(scoring, layout, q, pages, page_table, seq_lens, cu_seqlens_q, (k_scale, k_scale))


@np.errstate(all="ignore")
def merge_states(
    outs: np.ndarray | Sequence[np.ndarray], lses: np.ndarray | Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Merge attention over disjoint sets of keys: ``lse = log sum exp(lse_i)``, ``out = sum exp(lse_i - lse) out_i``.

    A part with lse -inf saw no key and is left out, whatever its values. A part with lse NaN or +inf makes the result
    NaN. A NaN or an infinity among the values of any other part reaches the result, however small the part's share.

    Args:
        outs: bfloat16, float16, float32 or float64 ``[num_parts, num_q_tokens, num_q_heads, head_dim_v]``, or a
            sequence of parts.
        lses: float32 or float64 ``[num_parts, num_q_tokens, num_q_heads]``, natural logarithms, or a sequence of parts.

    Returns:
        Values ``[num_q_tokens, num_q_heads, head_dim_v]`` and log-sum-exp ``[num_q_tokens, num_q_heads]``, float64;
        zeros and -inf where no part saw a key.

    Raises:
        TypeError, ValueError: see `kvq_core.arguments.check_merge_states`.
    """
    dtypes = (*FLOAT_DTYPES, "float64")
    check_merge_states([_spec(x) for x in outs], [_spec(x) for x in lses], dtypes, ("float32", "float64"))
    values, stacked = np.asarray(outs, np.float64), np.asarray(lses, np.float64)
    peak = stacked.max(axis=0)
    shift = np.where(peak == -np.inf, 0.0, peak)
    weights = np.exp(stacked - shift)
    total = weights.sum(axis=0)
    weights = (weights / np.where(total == 0, 1.0, total))[..., None]
    shares = np.where(np.isfinite(values), weights * values, weights + values)
    return np.where(stacked[..., None] == -np.inf, 0.0, shares).sum(axis=0), shift + np.log(total)


class _Scoring(NamedTuple):
    """How scores come from dot products: numbers, and float64 ``[num_kv_heads, num_q_heads / num_kv_heads]``."""

    sm_scale: float
    causal: bool
    window: int | None
    softcap: float | None
    slopes: np.ndarray
    sinks: np.ndarray


def _attend_sequences(
    scoring: _Scoring,
    layout: CacheLayout | MLALayout,
    q: np.ndarray,
    pages: np.ndarray,
    page_table: np.ndarray,
    seq_lens: np.ndarray,
    cu_seqlens_q: np.ndarray | None,
    scales: tuple[float | np.ndarray, float | np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Attend from all queries, sequence by sequence."""
    num_q_tokens, num_q_heads, head_dim = q.shape
    heads = scoring.slopes.shape
    q = q.astype(np.float64).reshape(num_q_tokens, *heads, head_dim)
    out = np.zeros((num_q_tokens, *heads, layout.head_dim_v))
    lse = np.full((num_q_tokens, *heads), -np.inf)
    ends = np.arange(1, len(seq_lens) + 1) if cu_seqlens_q is None else cu_seqlens_q[1:]
    start = 0
    for page_ids, seq_len, end in zip(page_table, seq_lens.tolist(), ends.tolist(), strict=True):
        page_ids = page_ids[: max(0, -(-seq_len // layout.page_size))]
        k, v = (_by_head(x) for x in _read_keys(layout, pages, page_ids, scales))
        for tile in (slice(i, min(i + _QUERY_TILE, end)) for i in range(start, end, _QUERY_TILE)):
            positions = np.arange(tile.start, tile.stop) + (seq_len - end)
            first, stop = _visible_keys(positions, seq_len, scoring.causal, scoring.window)
            out[tile], lse[tile] = _attend(scoring, q[tile], k, v, positions, first, stop)
        start = end
    return out.reshape(num_q_tokens, num_q_heads, layout.head_dim_v), lse.reshape(num_q_tokens, num_q_heads)


def _visible_keys(
    positions: np.ndarray, seq_len: int, causal: bool, window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """The first key that each query sees, and the one after its last."""
    first = np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1)
    stop = positions + 1 if causal else np.full_like(positions, seq_len)
    return first, stop


def _attend(
    scoring: _Scoring,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    positions: np.ndarray,
    first: np.ndarray,
    stop: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Attend from queries ``[n, *heads, head_dim]`` to the keys that each sees; return values and log-sum-exp."""
    keys = np.arange(k.shape[1])
    is_visible = (first[:, None] <= keys) & (keys < stop[:, None])
    scores = scoring.sm_scale * (np.moveaxis(q, 0, 2) @ k[:, None].swapaxes(2, 3))
    if scoring.softcap is not None:
        scores = scoring.softcap * np.tanh(scores / scoring.softcap)
    scores = scores + scoring.slopes[..., None, None] * (keys - positions[:, None])
    scores = np.where(is_visible, scores, -np.inf)
    lse = np.logaddexp(_logsumexp(scores), scoring.sinks[..., None])
    weights = np.where(is_visible, np.exp(scores - lse[..., None]), 0.0)
    out = _weighted_sum(weights, v, is_visible)
    is_past_table = stop > np.maximum(first, k.shape[1])
    out[..., is_past_table, :] = lse[..., is_past_table] = np.nan
    return np.moveaxis(out, 2, 0), np.moveaxis(lse, 2, 0)


def _weighted_sum(weights: np.ndarray, v: np.ndarray, is_visible: np.ndarray) -> np.ndarray:
    """``weights [*heads, n, num_keys] @ v``, where a row with NaN or infinity reaches only the queries that see it."""
    is_finite: np.ndarray = np.all(np.isfinite(v), axis=-1)
    out = weights @ np.where(is_finite[..., None], v, 0.0)[:, None]
    for head, key in np.argwhere(~is_finite):
        seeing = is_visible[:, key]
        out[head][:, seeing] += weights[head][:, seeing, key, None] * v[head, key]
    return out


def _logsumexp(scores: np.ndarray) -> np.ndarray:
    """Over the last axis; -inf where all scores are."""
    peak = scores.max(axis=-1, initial=-np.inf)
    shift = np.where(peak == -np.inf, 0.0, peak)
    return np.log(np.exp(scores - shift[..., None]).sum(axis=-1)) + shift


def _per_head(x: np.ndarray | None, heads: tuple[int, int], default: float) -> np.ndarray:
    return np.full(heads, default) if x is None else x.astype(np.float64).reshape(heads)


def _by_head(rows: np.ndarray) -> np.ndarray:
    """float64 ``[num_kv_heads, num_tokens, n]`` of ``[num_tokens, num_kv_heads, n]``."""
    return rows.swapaxes(0, 1).astype(np.float64, order="C")


def _read_keys(
    layout: CacheLayout | MLALayout,
    pages: np.ndarray,
    page_ids: np.ndarray,
    scales: tuple[float | np.ndarray, float | np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """float32 K and V ``[n * page_size, num_kv_heads, dim]`` as attention sees them."""
    if isinstance(layout, CacheLayout):
        return _read_pages(layout, pages, page_ids, *scales)
    latent, rope = _read_pages(layout.records, pages, page_ids, *scales)
    return np.concatenate([latent, rope], axis=-1), latent


def _read_pages(
    layout: CacheLayout,
    pages: np.ndarray,
    page_ids: np.ndarray,
    k_scale: float | np.ndarray,
    v_scale: float | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """float32 K and V ``[..., n * page_size, num_kv_heads, dim]`` of ``page_ids [..., n]``; NaN outside the pool."""
    is_page = _is_page(page_ids, pages)
    inside = page_ids[is_page]
    num_tokens = page_ids.shape[-1] * layout.page_size
    sides = []
    for side, mode, scale in (("k", layout.k_mode, k_scale), ("v", layout.v_mode, v_scale)):
        codes = record_field(layout, pages, f"{side}_codes")
        if mode.is_per_token_head:
            scale = record_field(layout, pages, f"{side}_scales")[inside, ..., 0]
        rows = np.full((*page_ids.shape, *codes.shape[1:]), np.nan, np.float32)
        rows[is_page] = decode_rows(codes[inside], mode, scale)
        sides.append(rows.swapaxes(-2, -3).reshape(*page_ids.shape[:-1], num_tokens, codes.shape[1], codes.shape[-1]))
    return sides[0], sides[1]


def _is_page(page_ids: np.ndarray, pages: np.ndarray) -> np.ndarray:
    return (page_ids >= 0) & (page_ids < pages.shape[0])


def _spec(x: np.ndarray) -> ArraySpec:
    return ArraySpec(x.dtype.name, x.shape, tuple(stride // x.itemsize for stride in x.strides))


def _optional_spec(x: np.ndarray | None) -> ArraySpec | None:
    return None if x is None else _spec(x)
