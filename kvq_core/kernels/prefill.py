"""Attention of many queries: every program takes a tile of one sequence's queries over all keys they see."""

import triton
import triton.language as tl

from kvq_core.kernels.attend import LOG2E, attend_keys, load_queries, scale_parts, store_parts
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
    R: tl.constexpr = S.records
    pid = tl.program_id(0)
    head = pid % R.num_kv_heads
    seq, first_index = find_query_tile(pid // R.num_kv_heads, cu_seqlens_q_ptr, num_seqs, S)
    is_padding = seq == num_seqs
    seq_start = tl.load(cu_seqlens_q_ptr + seq)
    num_queries = (
        tl.where(is_padding, num_q_tokens, tl.load(cu_seqlens_q_ptr + seq + 1, mask=seq < num_seqs)) - seq_start
    )
    seq_len = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    if first_index < num_queries:
        row = tl.arange(0, S.rows)
        q_index = first_index + row // S.group
        token = seq_start + q_index
        valid = (row < S.queries * S.group) & (q_index < num_queries) & (token >= 0) & (token < num_q_tokens)
        q_pos = seq_len - num_queries + q_index
        q_head = head * S.group + row % S.group
        strides = (q_stride_token, q_stride_head)
        query = load_queries(q_ptr, k_scale_ptr, alibi_slopes_ptr, token, q_head, q_pos, valid, strides, S)

        capacity = max_pages * R.page_size
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
            sink = tl.load(sinks_ptr + q_head, mask=valid & ~is_padding, other=float("-inf")) * LOG2E
            share, lse = add_sink(lse, sink)
            out = scale_parts(out, share, S)
        # A query that sees a key the page table has no column for.
        poison = tl.where(last_visible >= capacity, float("nan"), 1.0)
        out = scale_parts(out, poison, S)
        out_row = token.to(tl.int64) * S.num_q_heads + q_head
        store_parts(out_ptr, out_row, valid, out, S)
        tl.store(lse_ptr + out_row, lse * LN2 * poison, mask=valid)
