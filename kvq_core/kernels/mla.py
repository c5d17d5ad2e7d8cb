"""Attention over MLA caches: a key is ``[latent | rope]``, its value the latent, which is read once and used twice."""

import triton
import triton.language as tl

from kvq_core.kernels.attend import (
    LOG2E,
    has_halves,
    out_columns,
    part_width,
    scale_parts,
    store_parts,
    to_k_operand,
    to_v_operand,
)
from kvq_core.kernels.decode import LN2, partial_lse
from kvq_core.kernels.latent import MANY_ROWS, attend_keys
from kvq_core.kernels.segments import find_query_tile, find_sequence, keys_of, part_start, queries_of, total_tiles


@triton.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_segments(
    q_ptr,  # [num_q_tokens, num_heads, rank + rope_dim] bfloat16, float16 or float32
    pages_ptr,  # uint8 [num_pages, 1, record_bytes]
    k_scale_ptr,  # float32 [], per-tensor modes
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1] if S.has_cu_seqlens
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    partial_ptr,  # out float32 [num_segments, 1, S.part_stride]: see decode.partial_lse
    S: tl.constexpr,
):
    """One part of the keys of all sequences, for S.rows query rows. `merge_segments` puts the parts together."""
    pid = tl.program_id(0)
    row = pid % S.row_blocks * S.rows + tl.arange(0, S.rows)
    program = (pid // S.row_blocks).to(tl.int64)
    capacity = max_pages * S.records.page_size
    if S.overlap:
        tl.extra.cuda.gdc_launch_dependents()
    total, _ = total_tiles(0, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
    tile = part_start(program, total, S)
    last_tile = part_start(program + 1, total, S)
    if tile < last_tile:
        seq, first_tile = find_sequence(tile, seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity, S)
        while tile < last_tile:
            seq_len = tl.load(seq_lens_ptr + seq)
            first_query, num_queries = queries_of(seq, seq < num_seqs, cu_seqlens_q_ptr, S)
            q_index = row // S.group
            token = first_query + q_index
            valid = (row < S.queries * S.group) & (q_index < num_queries) & (token >= 0) & (token < num_q_tokens)
            q_pos = seq_len - num_queries + q_index
            strides = (q_stride_token, q_stride_head)
            part_ptr = partial_ptr + (program + seq) * S.part_stride
            query = load_queries(q_ptr, k_scale_ptr, (part_ptr, row), token, row % S.group, q_pos, valid, strides, S)

            seq_start, seq_end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
            start = seq_start + ((tile - first_tile) * S.tile).to(tl.int32)
            end = seq_start + ((last_tile - first_tile) * S.tile).to(tl.int32)
            all_visible_end = seq_len - num_queries + 1 if S.causal else seq_len
            pool = (pages_ptr, page_table_ptr + seq.to(tl.int64) * max_pages, num_pages, max_pages)
            out, lse = attend_keys(query, pool, start, tl.minimum(end, seq_end), all_visible_end, k_scale_ptr, S)
            store_parts(part_ptr, row, valid, out, S)
            tl.store(partial_lse(part_ptr, S) + row, lse, mask=valid)

            first_tile += tl.cdiv(seq_end - seq_start, S.tile)
            tile = first_tile
            seq += 1


@triton.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_queries(
    q_ptr,  # [num_q_tokens, num_heads, rank + rope_dim] bfloat16, float16 or float32
    pages_ptr,  # uint8 [num_pages, 1, record_bytes]
    k_scale_ptr,  # float32 [], per-tensor modes
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1]
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    out_ptr,  # out [num_q_tokens, num_heads, rank]
    lse_ptr,  # out float32 [num_q_tokens, num_heads]
    S: tl.constexpr,
):
    """S.queries queries of one sequence, one of S.row_blocks blocks of their heads."""
    HEADS: tl.constexpr = (S.group + S.row_blocks - 1) // S.row_blocks
    pid = tl.program_id(0)
    seq, first_index = find_query_tile(pid // S.row_blocks, cu_seqlens_q_ptr, num_seqs, S)
    is_padding = seq == num_seqs
    seq_start = tl.load(cu_seqlens_q_ptr + seq)
    seq_stop = tl.where(is_padding, num_q_tokens, tl.load(cu_seqlens_q_ptr + seq + 1, mask=seq < num_seqs))
    num_queries = seq_stop - seq_start
    seq_len = tl.load(seq_lens_ptr + seq, mask=seq < num_seqs, other=0)
    if first_index < num_queries:
        row = tl.arange(0, S.rows)
        q_index = first_index + row // HEADS
        token = seq_start + q_index
        q_head = pid % S.row_blocks * HEADS + row % HEADS
        valid = (row < S.queries * HEADS) & (q_head < S.group) & (q_index < num_queries)
        valid = valid & (token >= 0) & (token < num_q_tokens)
        q_pos = seq_len - num_queries + q_index
        strides = (q_stride_token, q_stride_head)
        out_row = token.to(tl.int64) * S.num_q_heads + q_head
        query = load_queries(q_ptr, k_scale_ptr, (out_ptr, out_row), token, q_head, q_pos, valid, strides, S)

        capacity = max_pages * S.records.page_size
        first_pos = seq_len - num_queries + first_index
        last_pos = tl.minimum(first_pos + S.queries, seq_len) - 1
        end = tl.minimum(last_pos + 1 if S.causal else seq_len, capacity)
        all_visible_end = first_pos + 1 if S.causal else seq_len
        last_visible = q_pos if S.causal else tl.zeros_like(q_pos) + (seq_len - 1)
        pool = (pages_ptr, page_table_ptr + seq.to(tl.int64) * max_pages, num_pages, max_pages)
        out, lse = attend_keys(query, pool, seq_len * 0, end, all_visible_end, k_scale_ptr, S)
        # A query that sees a key the page table has no column for.
        poison = tl.where(last_visible >= capacity, float("nan"), 1.0)
        store_parts(out_ptr, out_row, valid, scale_parts(out, poison, S), S)
        tl.store(lse_ptr + out_row, lse * LN2 * poison, mask=valid)


@triton.jit
def load_queries(q_ptr, k_scale_ptr, scratch, token, q_head, q_pos, valid, strides, S: tl.constexpr):
    """Rows of q: parts for the latent with what turns their dots into scores, the same for the rope part, q_pos."""
    ROPE: tl.constexpr = S.records.k
    stride_token, stride_head = strides
    element = token.to(tl.int64) * (stride_token.to(tl.int64) * S.q_align) + q_head.to(tl.int64) * (
        stride_head.to(tl.int64) * S.q_align
    )
    rows = q_ptr + element
    d = tl.arange(0, ROPE.padded_dim)
    rope_mask = valid[:, None] & (d < ROPE.head_dim)[None, :]
    rope = tl.load(rows[:, None] + S.records.v.head_dim + d[None, :], mask=rope_mask, other=0.0)
    scale = tl.full([S.rows], S.sm_scale * LOG2E, tl.float32)
    if S.records.v.per_tensor:
        scale *= tl.load(k_scale_ptr)
    rope_scale = scale
    if has_halves(S):
        HALF: tl.constexpr = S.records.v.head_dim // 2
        c = tl.arange(0, part_width(S))
        mask = valid[:, None] & (c < HALF)[None, :]
        lower = tl.load(rows[:, None] + c[None, :], mask=mask, other=0.0)
        upper = tl.load(rows[:, None] + (HALF + c)[None, :], mask=mask, other=0.0)
        latent = (to_v_operand(lower, S), to_v_operand(upper, S))
    else:
        columns, exist = out_columns(S)
        whole = tl.load(rows[:, None] + columns[None, :], mask=valid[:, None] & exist[None, :], other=0.0)
        if S.normalize_q:
            rope_is_float16: tl.constexpr = S.k_operand == "float16"
            largest = largest_bits(whole)
            if rope_is_float16:
                largest = tl.maximum(largest, largest_bits(rope))
            power, inverse = powers(largest)
            whole = whole * inverse[:, None]
            scale *= power
            if rope_is_float16:
                rope = rope * inverse[:, None]
                rope_scale *= power
        whole = to_v_operand(whole, S)
        if S.rows >= MANY_ROWS and S.normalize_q:
            whole = _through_memory(whole, scratch, valid, S)
        if S.v_parts == 1:
            latent = (whole,)
        else:
            latent = tl.split(tl.reshape(whole, [S.rows, part_width(S), 2]))
    return latent, scale, to_k_operand(rope, S), rope_scale, q_pos


@triton.jit
def _through_memory(latent, scratch, valid, S: tl.constexpr):
    """Store rows and load them again: only what comes from a load stays in shared memory as a left operand.

    Anything else Triton keeps in registers, and there are not enough. Rows of the results are free until the end.
    """
    scratch_ptr, scratch_row = scratch
    columns, exist = out_columns(S)
    ptr = scratch_ptr.to(tl.pointer_type(tl.float16), bitcast=True)
    ROW: tl.constexpr = S.records.v.head_dim * (scratch_ptr.dtype.element_ty.primitive_bitwidth // 16)
    ptrs = ptr + scratch_row[:, None] * ROW + columns[None, :]
    mask = valid[:, None] & exist[None, :]
    tl.store(ptrs, latent, mask=mask)
    tl.debug_barrier()
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def largest_bits(x):
    """The bits of the largest magnitude of each row, in float32."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def powers(largest_bits):
    """A power of two whose inverse brings the largest element to [2^14, 2^15), if it is finite, and that inverse."""
    exponent = tl.minimum(tl.maximum(largest_bits >> 23, 15), 253)
    power = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return power, ((268 - exponent) << 23).to(tl.float32, bitcast=True)
