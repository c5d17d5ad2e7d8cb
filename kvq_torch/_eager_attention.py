"""Paged attention in vectorised torch: float32 throughout, dense scores, bounded memory."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch

from kvq_core.arguments import AttentionCall, check_paged_attention
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_mla_attention
from kvq_torch._interop import CallKey, keyed_call
from kvq_torch._pages import read_pages

_CHUNK_BYTES = 1 << 26  # of one temporary; a handful are alive at a time


class _Scoring(NamedTuple):
    """The static half of attention, and its arrays per head, float32 ``[num_kv_heads, group, 1, 1]``."""

    call: AttentionCall
    slopes: torch.Tensor | None
    sinks: torch.Tensor | None


class _Keys(NamedTuple):
    """The cached rows of a block of sequences and KV heads, float32 ``[num_seqs, num_kv_heads, num_keys, ...]``."""

    k: torch.Tensor
    finite_v: torch.Tensor  # zero where V is not finite
    v_flags: torch.Tensor  # 1 where V is NaN or inf, then 1 where V is NaN or -inf: [..., 2 * head_dim_v]
    seq_lens: torch.Tensor  # int64 [num_seqs, 1]


def paged_attention(
    layout: CacheLayout,
    call_key: CallKey,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvq_torch.paged_attention`; always returns out and lse."""
    call = keyed_call(call_key)
    check_paged_attention(layout, call)
    num_kv_heads = pages.shape[layout.head_axis]
    heads = (num_kv_heads, q.shape[1] // num_kv_heads)
    scoring = _Scoring(
        call,
        None if alibi_slopes is None else alibi_slopes.view(*heads, 1, 1),
        None if sinks is None else sinks.view(*heads, 1, 1),
    )
    return _attend_blocks(scoring, layout, q, pages, k_scale, v_scale, page_table, seq_lens, cu_seqlens_q)


def mla_attention(
    layout: MLALayout,
    call_key: CallKey,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kvq_torch.mla_attention`; always returns out and lse."""
    call = keyed_call(call_key)
    check_mla_attention(layout, call)
    scoring = _Scoring(call, slopes=None, sinks=None)
    return _attend_blocks(scoring, layout, q, pages, k_scale, k_scale, page_table, seq_lens, cu_seqlens_q)


def _attend_blocks(
    scoring: _Scoring,
    layout: CacheLayout | MLALayout,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend from all queries, a block of sequences, KV heads and queries at a time."""
    num_q_tokens, num_q_heads, _ = q.shape
    num_kv_heads = pages.shape[layout.head_axis]
    heads = (num_kv_heads, num_q_heads // num_kv_heads)
    if page_table.shape[1] == 0:
        page_table = page_table.new_full((page_table.shape[0], 1), -1)  # as good as none, and a maximum needs a column
    firsts, counts = _query_ranges(cu_seqlens_q, seq_lens)
    most_queries = 1 if cu_seqlens_q is None else min(scoring.call.max_seqlen_q or num_q_tokens, num_q_tokens)
    # One row more than asked for takes the results of queries that a sequence does not have.
    out = q.new_zeros((num_q_tokens + 1, *heads, layout.head_dim_v))
    lse = q.new_full((num_q_tokens + 1, *heads), -torch.inf, dtype=torch.float32)
    q = q.unflatten(1, heads)
    sizes = _chunk_sizes(layout, page_table, heads, most_queries)
    for seqs, kv_heads in itertools.product(_slices(page_table.shape[0], sizes[0]), _slices(heads[0], sizes[1])):
        local = pages.narrow(layout.head_axis, kv_heads.start, kv_heads.stop - kv_heads.start)
        keys = _read_keys(layout, local, k_scale, v_scale, page_table[seqs], seq_lens[seqs])
        for queries in _slices(most_queries, sizes[2]):
            index = torch.arange(queries.start, queries.stop, device=q.device)
            rows = torch.where(index < counts[seqs], firsts[seqs] + index, num_q_tokens).clamp(0, num_q_tokens)
            block = q[:, kv_heads][rows.clamp(max=num_q_tokens - 1)]
            positions = keys.seq_lens - counts[seqs] + index
            values, out_lse = _attend(_of_heads(scoring, kv_heads), block, keys, positions)
            out[rows, kv_heads], lse[rows, kv_heads] = values.to(out.dtype), out_lse
    return out[:num_q_tokens].flatten(1, 2), lse[:num_q_tokens].flatten(1, 2)


def _query_ranges(cu_seqlens_q: torch.Tensor | None, seq_lens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row of q of each sequence and its number of queries, int64 ``[num_seqs, 1]``."""
    if cu_seqlens_q is None:
        firsts = torch.arange(seq_lens.shape[0], device=seq_lens.device)
        return firsts[:, None], torch.ones_like(firsts)[:, None]
    cu_seqlens_q = cu_seqlens_q.long()
    return cu_seqlens_q[:-1, None], cu_seqlens_q.diff()[:, None]


def _chunk_sizes(
    layout: CacheLayout | MLALayout, page_table: torch.Tensor, heads: tuple[int, int], most_queries: int
) -> tuple[int, int, int]:
    """How many sequences, KV heads and queries to attend with at a time, so that no temporary is much too large."""
    num_keys = page_table.shape[1] * layout.page_size
    head_bytes = 4 * num_keys * (layout.head_dim + 3 * layout.head_dim_v)
    num_heads = min(heads[0], max(1, _CHUNK_BYTES // head_bytes))
    num_seqs = min(page_table.shape[0], max(1, _CHUNK_BYTES // (head_bytes * heads[0])))
    query_bytes = 4 * num_keys * heads[1] * num_heads * num_seqs
    return max(1, num_seqs), num_heads, max(1, min(most_queries, _CHUNK_BYTES // max(1, query_bytes)))


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


def _of_heads(scoring: _Scoring, kv_heads: slice) -> _Scoring:
    slopes, sinks = (None if x is None else x[kv_heads] for x in (scoring.slopes, scoring.sinks))
    return scoring._replace(slopes=slopes, sinks=sinks)


def _read_keys(
    layout: CacheLayout | MLALayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_ids: torch.Tensor,
    seq_lens: torch.Tensor,
) -> _Keys:
    """Read the pages of a block of sequences, one column per token of the table."""
    records = layout if isinstance(layout, CacheLayout) else layout.records
    k, v = (x.transpose(1, 2).flatten(2, 3) for x in read_pages(records, pages, k_scale, v_scale, page_ids))
    if isinstance(layout, MLALayout):
        k, v = torch.cat([k, v], dim=-1), k
    is_nan = v.isnan()
    v_flags = torch.cat([is_nan | (v == torch.inf), is_nan | (v == -torch.inf)], dim=-1)
    return _Keys(k, torch.where(v.isfinite(), v, 0.0), v_flags.float(), seq_lens.long()[:, None])


def _attend(
    scoring: _Scoring, q: torch.Tensor, keys: _Keys, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with a block of queries.

    Args:
        scoring: of the KV heads at hand.
        q: ``[num_seqs, n, num_kv_heads, group, head_dim]``.
        keys: of the same sequences and heads.
        positions: int64 ``[num_seqs, n]``.

    Returns:
        float32 values ``[num_seqs, n, num_kv_heads, group, head_dim_v]`` and log-sum-exp without the last axis.
    """
    group_and_queries = (q.shape[3], q.shape[1])
    rows = q.permute(0, 2, 3, 1, 4).flatten(2, 3).float() * scoring.call.score_scale
    scores = (rows @ keys.k.transpose(2, 3)).unflatten(2, group_and_queries)
    softcap = scoring.call.softcap
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    key_index = torch.arange(keys.k.shape[2], device=q.device)
    if scoring.slopes is not None:
        scores += scoring.slopes * (key_index - positions[..., None])[:, None, None]
    visible = _visible(scoring.call, keys.seq_lens, positions, key_index)
    scores.masked_fill_(~visible[:, None, None], -torch.inf)
    last_visible = positions if scoring.call.causal else keys.seq_lens - 1
    past_table = (last_visible >= key_index.shape[0])[:, None, None, :, None]
    weights, lse = _softmax(scores, scoring.sinks, past_table)
    values = (weights.flatten(2, 3) @ keys.finite_v).unflatten(2, group_and_queries)
    values = values + _seen_nonfinite(visible, keys.v_flags)[:, :, None]
    return values.permute(0, 3, 1, 2, 4), lse.permute(0, 3, 1, 2)


def _visible(
    call: AttentionCall, seq_lens: torch.Tensor, positions: torch.Tensor, key_index: torch.Tensor
) -> torch.Tensor:
    """Which keys each query sees, bool ``[num_seqs, n, num_keys]``."""
    positions = positions[..., None]
    visible = (key_index < seq_lens[..., None]).expand(*positions.shape[:2], -1)
    if call.causal:
        visible = visible & (key_index <= positions)
    if call.window is not None:
        visible = visible & (key_index > positions - call.window)
    return visible


def _softmax(
    scores: torch.Tensor, sinks: torch.Tensor | None, is_unknown: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights over the last axis (in place of ``scores``) and the log-sum-exp; NaN where ``is_unknown``."""
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks)
    shift = torch.where(is_unknown, torch.nan, torch.where(peak == -torch.inf, 0.0, peak))
    weights = scores.sub_(shift).exp_()
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks - shift).exp()
    lse = (shift + total.log()).squeeze(-1)
    return weights.div_(torch.where(total == 0, 1.0, total)), lse


def _seen_nonfinite(visible: torch.Tensor, v_flags: torch.Tensor) -> torch.Tensor:
    """What NaN and infinities in visible V rows add to the values ``[num_seqs, num_kv_heads, n, head_dim_v]``, or zero.

    They cannot go through the weighted sum, where a zero weight of a key that is not visible would turn them into NaN.
    """
    high, low = (visible[:, None].float() @ v_flags).chunk(2, dim=-1)
    return torch.where(high > 0, torch.inf, 0.0) + torch.where(low > 0, -torch.inf, 0.0)
