"""Attention of few queries over many keys: the keys are split over programs, and the parts merged."""

import triton
import triton.language as tl

from kvq_core.kernels.attend import LOG2E, attend_keys, load_queries, store_parts
from kvq_core.kernels.codec import round_for
from kvq_core.kernels.segments import (
    find_sequence,
    keys_of,
    part_of,
    part_start,
    queries_of,
    sequence_of_token,
    total_tiles,
)

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_segments(
    q_ptr,  # [num_q_tokens, num_q_heads, head_dim] bfloat16, float16 or float32
    pages_ptr,  # uint8, the axes of the layout
    k_scale_ptr,  # float32 [], per-tensor modes
    v_scale_ptr,  # float32 []
    sinks_ptr,  # float32 [num_q_heads], read by merge_segments only
    alibi_slopes_ptr,  # float32 [num_q_heads] if S.has_alibi
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1] if S.has_cu_seqlens
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    partial_ptr,  # out float32 [num_segments, num_kv_heads, S.part_stride]: see partial_lse
    S: tl.constexpr,
):
    """One part of the keys of all sequences, for S.rows query rows of one KV head."""
    R: tl.constexpr = S.records
    pid = tl.program_id(0)
    head = pid % R.num_kv_heads
    row_block = pid // R.num_kv_heads % S.row_blocks
    program = (pid // (R.num_kv_heads * S.row_blocks)).to(tl.int64)
    capacity = max_pages * R.page_size
    if S.overlap:
        tl.extra.cuda.gdc_launch_dependents()
    total, _ = total_tiles(0, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
    tile = part_start(program, total, S)
    last_tile = part_start(program + 1, total, S)
    if tile < last_tile:
        row = row_block * S.rows + tl.arange(0, S.rows)
        seq, first_tile = find_sequence(tile, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        while tile < last_tile:
            seq_len = tl.load(seq_lens_ptr + seq)
            first_query, num_queries = queries_of(seq, seq < num_seqs, cu_seqlens_q_ptr, S)
            q_index = row // S.group
            token = first_query + q_index
            valid = (row < S.queries * S.group) & (q_index < num_queries) & (token >= 0) & (token < num_q_tokens)
            q_pos = seq_len - num_queries + q_index
            q_head = head * S.group + row % S.group
            strides = (q_stride_token, q_stride_head)
            query = load_queries(q_ptr, k_scale_ptr, alibi_slopes_ptr, token, q_head, q_pos, valid, strides, S)

            seq_start, seq_end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
            start = seq_start + ((tile - first_tile) * S.tile).to(tl.int32)
            end = seq_start + ((last_tile - first_tile) * S.tile).to(tl.int32)
            all_visible_end = seq_len - num_queries + 1 if S.causal else seq_len
            pool = (pages_ptr, page_table_ptr + seq.to(tl.int64) * max_pages, head, num_pages, max_pages)
            out, lse = attend_keys(query, pool, start, tl.minimum(end, seq_end), all_visible_end, v_scale_ptr, S)
            part_ptr = partial_ptr + ((program + seq) * R.num_kv_heads + head) * S.part_stride
            store_parts(part_ptr, row, valid, out, S)
            tl.store(partial_lse(part_ptr, S) + row, lse, mask=valid)

            first_tile += tl.cdiv(seq_end - seq_start, S.tile)
            tile = first_tile
            seq += 1


@triton.jit(do_not_specialize=["num_q_tokens", "num_seqs", "max_pages"])
def merge_segments(
    partial_ptr,  # float32 [num_segments, num_kv_heads, S.part_stride]: see partial_lse
    sinks_ptr,  # float32 [num_q_heads] if S.has_sinks
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1] if S.has_cu_seqlens
    num_q_tokens,
    num_seqs,
    max_pages,
    out_ptr,  # out [num_q_tokens, num_q_heads, head_dim_v]
    lse_ptr,  # out float32 [num_q_tokens, num_q_heads]
    S: tl.constexpr,
    PARTS: tl.constexpr,
    FEW_PARTS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Merge COLUMNS columns of one query of one head: PARTS parts at a time, or FEW_PARTS if these are all."""
    V: tl.constexpr = S.records.v
    CAPS: tl.constexpr = S.records.caps
    COLUMN_BLOCKS: tl.constexpr = (V.head_dim + COLUMNS - 1) // COLUMNS
    column_block = tl.program_id(0) % COLUMN_BLOCKS
    q_head = tl.program_id(0) // COLUMN_BLOCKS % S.num_q_heads
    token = tl.program_id(0) // (COLUMN_BLOCKS * S.num_q_heads)
    seq, q_index = sequence_of_token(token, cu_seqlens_q_ptr, num_seqs, S)
    capacity = max_pages * S.records.page_size
    total, first_tile = total_tiles(seq, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
    start, end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
    tiles = tl.cdiv(end - start, S.tile)
    first_part = part_of(first_tile, total, S)
    parts = tl.where(tiles > 0, part_of(first_tile + tiles - 1, total, S) - first_part + 1, 0).to(tl.int32)
    promised = q_index < S.queries  # queries past max_seqlen_q were not attended to: their result is NaN
    row = tl.where(promised, q_index, 0) * S.group + q_head % S.group
    d = column_block * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.full([], float("-inf"), tl.float32)
    l = tl.full([], 0.0, tl.float32)
    acc = tl.full([COLUMNS], 0.0, tl.float32)
    if S.overlap:
        tl.extra.cuda.gdc_wait()
    state = (m, l, acc)
    where = (partial_ptr, first_part, parts, seq, q_head // S.group, row, d)
    if FEW_PARTS < PARTS and parts <= FEW_PARTS:
        state = _merge_parts(state, 0, where, FEW_PARTS, S)
    else:
        for first in range(0, parts, PARTS):
            state = _merge_parts(state, first, where, PARTS, S)
    m, l, acc = state
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
    out = acc * tl.where(l == 0.0, 0.0, 1.0 / l)
    exists = seq < num_seqs
    if S.has_sinks:
        sink = tl.where(exists, tl.load(sinks_ptr + q_head) * LOG2E, float("-inf"))
        share, lse = add_sink(lse, sink)
        out = out * share
    last_visible = tl.load(seq_lens_ptr + seq, mask=exists, other=0) - 1
    if S.causal and S.has_cu_seqlens:
        _, num_queries = queries_of(seq, exists, cu_seqlens_q_ptr, S)
        last_visible += q_index + 1 - num_queries
    poison = tl.where(exists & ((last_visible >= capacity) | ~promised), float("nan"), 0.0)
    out_row = token.to(tl.int64) * S.num_q_heads + q_head
    values = round_for(out_ptr, out + poison, CAPS)
    tl.store(out_ptr + out_row * V.head_dim + d, values, mask=d < V.head_dim)
    tl.store(lse_ptr + out_row, lse * LN2 + poison, mask=column_block == 0)


@triton.jit
def _merge_parts(state, first, where, PARTS: tl.constexpr, S: tl.constexpr):
    """Merge PARTS parts from ``first`` into maximum, sum of weights and weighted sum of values."""
    V: tl.constexpr = S.records.v
    m, l, acc = state
    partial_ptr, first_part, parts, seq, head, row, d = where
    part = first + tl.arange(0, PARTS)
    segment = first_part + part + seq
    part_ptrs = partial_ptr + (segment * S.records.num_kv_heads + head) * S.part_stride
    exists = part < parts
    lse = tl.load(partial_lse(part_ptrs, S) + row, mask=exists, other=float("-inf"))
    mask = exists[:, None] & (d < V.head_dim)[None, :]
    partial = tl.load(part_ptrs[:, None] + (row * V.head_dim + d)[None, :], mask=mask, other=0.0)
    m_new = tl.maximum(m, tl.max(lse, axis=0))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    weight = tl.exp2(lse - m_safe)
    l = l * alpha + tl.sum(weight, axis=0)
    acc = acc * alpha + tl.sum(partial * weight[:, None], axis=0)
    return m_new, l, acc


@triton.jit
def partial_lse(part_ptr, S: tl.constexpr):
    """Where the log-sum-exps of a part lie: behind its values, in one buffer, as allocating another takes host time.

    A part of a KV head is float32 [queries * group, head_dim_v], then [queries * group] in units of log2.
    """
    return part_ptr + S.queries * S.group * S.records.v.head_dim


@triton.jit
def add_sink(lse, sink):
    """Let a logit join the denominator: the factor for outputs, and the new log-sum-exp (both in units of log2)."""
    m = tl.maximum(lse, sink)
    m = tl.where(m == float("-inf"), 0.0, m)
    with_sink = m + tl.log2(tl.exp2(lse - m) + tl.exp2(sink - m))
    share = tl.where(lse == float("-inf"), 0.0, tl.exp2(lse - with_sink))
    return share, with_sink
