"""Attention of many queries: every program takes a tile of one sequence's queries over all keys they see."""

import triton
import triton.language as tl

from kvq_core.kernels.attend import (
    LOG2E,
    attend_keys,
    first,
    load_queries,
    out_columns,
    scale_parts,
    second,
    store_parts,
)
from kvq_core.kernels.codec import to_float32
from kvq_core.kernels.decode import LN2, add_sink
from kvq_core.kernels.segments import find_query_tile


@triton.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_queries(
    q_ptr,  # [num_q_tokens, num_q_heads, head_dim] bfloat16, float16 or float32
    pages_ptr,  # uint8, the axes of the layout
    k_scale_ptr,  # float32 [], per-tensor modes
    v_scale_ptr,  # float32 []
    sinks_ptr,  # float32 [num_q_heads] if S.has_sinks
    alibi_slopes_ptr,  # float32 [num_q_heads] if S.has_alibi
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1]
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    out_ptr,  # out [num_q_tokens, num_q_heads, head_dim_v]
    lse_ptr,  # out float32 [num_q_tokens, num_q_heads]
    S: tl.constexpr,
):
    """S.queries queries of one sequence, all heads of one KV head. Semantics: `kvq_core.reference.paged_attention`."""
    head = tl.program_id(0) % S.records.num_kv_heads
    tile = _find_tile(seq_lens_ptr, cu_seqlens_q_ptr, num_q_tokens, num_seqs, S)
    pool = (pages_ptr, page_table_ptr, head, num_pages, max_pages)
    scales = (k_scale_ptr, v_scale_ptr)
    strides = (q_stride_token, q_stride_head)
    _attend_tile(
        q_ptr, tile, pool, scales, sinks_ptr, alibi_slopes_ptr, num_q_tokens, num_seqs, strides, out_ptr, lse_ptr, S
    )


@triton.jit(
    do_not_specialize=[
        "num_q_tokens",
        "num_seqs",
        "num_pages",
        "max_pages",
        "q_stride_token",
        "q_stride_head",
        "num_queries",
        "num_keys",
    ]
)
def finish_queries(
    q_ptr,  # as of attend_queries
    pages_ptr,
    k_scale_ptr,
    v_scale_ptr,
    sinks_ptr,
    alibi_slopes_ptr,
    page_table_ptr,
    seq_lens_ptr,
    cu_seqlens_q_ptr,
    last_out_ptr,  # in-out q's dtype [num_seqs, num_queries, num_q_heads, head_dim_v]: causal, over the last keys
    last_lse_ptr,  # float32 [num_seqs, num_q_heads, num_queries]
    prefix_out_ptr,  # as last_out, over the keys before them, if HAS_PREFIX
    prefix_lse_ptr,
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,
    q_stride_head,
    num_queries,
    num_keys,
    out_ptr,  # last_out again
    lse_ptr,  # out float32 [num_q_tokens, num_q_heads]
    S: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
):
    """Accept what a library made of sequences of num_queries queries and num_keys keys; attend to any other here."""
    head = tl.program_id(0) % S.records.num_kv_heads
    tile = _find_tile(seq_lens_ptr, cu_seqlens_q_ptr, num_q_tokens, num_seqs, S)
    seq, first_index, seq_start, count, seq_len = tile
    expected = (seq_start == seq * num_queries) & (count == num_queries) & (seq_len == num_keys)
    if expected & (seq < num_seqs):
        row = tl.arange(0, S.rows)
        q_index = first_index + row // S.group
        valid = (row < S.queries * S.group) & (q_index < num_queries)
        q_head = head * S.group + row % S.group
        token = (seq_start + q_index).to(tl.int64)
        out_row = token * S.num_q_heads + q_head
        lse_index = (seq.to(tl.int64) * S.num_q_heads + q_head) * num_queries + q_index
        lse = tl.load(last_lse_ptr + lse_index, mask=valid, other=0.0) * LOG2E
        share = tl.full([S.rows], 1.0, tl.float32)
        if HAS_PREFIX:
            prefix_lse = tl.load(prefix_lse_ptr + lse_index, mask=valid, other=0.0) * LOG2E
            share, lse = add_sink(lse, prefix_lse)
            prefix_share = tl.where(prefix_lse == float("-inf"), 0.0, tl.exp2(prefix_lse - lse))
        if S.has_sinks:
            sink_share, lse = add_sink(lse, tl.load(sinks_ptr + q_head, mask=valid, other=float("-inf")) * LOG2E)
            share *= sink_share
            if HAS_PREFIX:
                prefix_share *= sink_share
        if HAS_PREFIX or S.has_sinks:
            columns, exist = out_columns(S)
            ptrs = first(columns, S) + second(out_row * S.records.v.head_dim, S)
            mask = first(exist, S) & second(valid, S)
            out = to_float32(tl.load(last_out_ptr + ptrs, mask=mask, other=0.0)) * second(share, S)
            if HAS_PREFIX:
                out += to_float32(tl.load(prefix_out_ptr + ptrs, mask=mask, other=0.0)) * second(prefix_share, S)
            store_parts(out_ptr, out_row, valid, (out,), S)
        tl.store(lse_ptr + out_row, lse * LN2, mask=valid)
    else:
        pool = (pages_ptr, page_table_ptr, head, num_pages, max_pages)
        scales = (k_scale_ptr, v_scale_ptr)
        strides = (q_stride_token, q_stride_head)
        _attend_tile(
            q_ptr, tile, pool, scales, sinks_ptr, alibi_slopes_ptr, num_q_tokens, num_seqs, strides, out_ptr, lse_ptr, S
        )


@triton.jit
def _find_tile(seq_lens_ptr, cu_seqlens_q_ptr, num_q_tokens, num_seqs, S: tl.constexpr):
    """This program's sequence, its first query in it, the sequence's first query and number of queries, its length.

    Past the last sequence come the padding queries.
    """
    tile = tl.program_id(0) // S.records.num_kv_heads
    seq, first_index = find_query_tile(tile, cu_seqlens_q_ptr, num_seqs, S)
    seq_start = tl.load(cu_seqlens_q_ptr + seq)
    end = tl.load(cu_seqlens_q_ptr + seq + 1, mask=seq < num_seqs)
    count = tl.where(seq == num_seqs, num_q_tokens, end) - seq_start
    seq_len = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    return seq, first_index, seq_start, count, seq_len


@triton.jit
def _attend_tile(
    q_ptr,
    tile,
    pool,
    scales,
    sinks_ptr,
    alibi_slopes_ptr,
    num_q_tokens,
    num_seqs,
    strides,
    out_ptr,
    lse_ptr,
    S: tl.constexpr,
):
    """Attend with a tile of queries, see `_find_tile`."""
    seq, first_index, seq_start, num_queries, seq_len = tile
    pages_ptr, page_table_ptr, head, num_pages, max_pages = pool
    k_scale_ptr, v_scale_ptr = scales
    if first_index < num_queries:
        row = tl.arange(0, S.rows)
        q_index = first_index + row // S.group
        token = seq_start + q_index
        valid = (row < S.queries * S.group) & (q_index < num_queries) & (token >= 0) & (token < num_q_tokens)
        q_pos = seq_len - num_queries + q_index
        q_head = head * S.group + row % S.group
        query = load_queries(q_ptr, k_scale_ptr, alibi_slopes_ptr, token, q_head, q_pos, valid, strides, S)

        capacity = max_pages * S.records.page_size
        first_pos = seq_len - num_queries + first_index
        last_pos = tl.minimum(first_pos + S.queries, seq_len) - 1
        start = seq_len * 0
        if S.window > 0:
            start = tl.maximum(first_pos - S.window + 1, 0) // S.tile * S.tile
        end = tl.minimum(last_pos + 1 if S.causal else seq_len, capacity)
        all_visible_end = first_pos + 1 if S.causal else seq_len
        last_visible = q_pos if S.causal else tl.zeros_like(q_pos) + (seq_len - 1)
        pool = (pages_ptr, page_table_ptr + seq.to(tl.int64) * max_pages, head, num_pages, max_pages)
        out, lse = attend_keys(query, pool, start, end, all_visible_end, v_scale_ptr, S)
        if S.has_sinks:
            sink = tl.load(sinks_ptr + q_head, mask=valid & (seq < num_seqs), other=float("-inf")) * LOG2E
            share, lse = add_sink(lse, sink)
            out = scale_parts(out, share, S)
        # A query that sees a key the page table has no column for.
        poison = tl.where(last_visible >= capacity, float("nan"), 1.0)
        out = scale_parts(out, poison, S)
        out_row = token.to(tl.int64) * S.num_q_heads + q_head
        store_parts(out_ptr, out_row, valid, out, S)
        tl.store(lse_ptr + out_row, lse * LN2 * poison, mask=valid)
