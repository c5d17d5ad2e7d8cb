"""Attention over MLA caches: a key is ``[latent | rope]``, its value the latent, which is read once and used twice.

In the specification ``S.records.v`` is the latent and ``S.records.k`` the rope part, what a key has besides its value.
Scales are folded as in `kvq_core.kernels.attend`; the scale of a latent row multiplies its scores and its values.

Few rows (of queries x heads) take their operands from registers, and the latent in two parts (``S.v_parts``), each with
a dot over the rank for the scores and one over the keys for the values: 8-bit codes are read as pairs of neighbours,
whose two bytes are the parts; a wider latent is read as two halves. 64 rows take both operands from one tile in shared
memory, converted once.
"""

import triton
import triton.language as tl

from kvq_core.kernels.attend import (
    LOG2E,
    MIN_SCALE,
    has_halves,
    out_columns,
    part_width,
    scale_parts,
    store_parts,
    to_k_operand,
    to_v_operand,
)
from kvq_core.kernels.codec import approximate_log2, approximate_reciprocal, decode_bytes, decode_pairs
from kvq_core.kernels.decode import LN2, partial_lse
from kvq_core.kernels.pages import load_page_ids, record_offsets, row_offsets, scale_ptrs, typed_ptr
from kvq_core.kernels.segments import find_query_tile, find_sequence, keys_of, part_start, queries_of, total_tiles

MANY_ROWS = tl.constexpr(64)
SHARES = tl.constexpr(2)  # groups of four warps that share out the scores of many rows


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
            largest = _largest_bits(whole)
            if rope_is_float16:
                largest = tl.maximum(largest, _largest_bits(rope))
            power, inverse = _powers(largest)
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
def _largest_bits(x):
    """The bits of the largest magnitude of each row, in float32."""
    return tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def _powers(largest_bits):
    """A power of two whose inverse brings the largest element to [2^14, 2^15), if it is finite, and that inverse."""
    exponent = tl.minimum(tl.maximum(largest_bits >> 23, 15), 253)
    power = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    return power, ((268 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def attend_keys(query, pool, start, end, all_visible_end, k_scale_ptr, S: tl.constexpr):
    """Attend to keys ``start`` to ``end``; those before ``all_visible_end`` are seen by every row.

    Returns the normalized output as S.v_parts parts, and the log2 of the sum of exponentials.
    """
    m = tl.full([S.rows], float("-inf"), tl.float32)
    # Sums of probabilities, added up at the end, so that warps wait for each other once less a tile. Of many rows, what
    # two groups of four warps share out has one sum for each of them; registers are short.
    l = tl.full([S.rows, SHARES if S.rows >= MANY_ROWS else S.tile], 0.0, tl.float32)
    part = tl.full([S.rows, part_width(S)], 0.0, tl.float32)
    if S.v_parts == 1:
        acc = (part,)
    else:
        acc = (part, part)
    state = (m, l, acc)
    masked_start = start + tl.maximum(tl.minimum(end, all_visible_end) - start, 0) // S.tile * S.tile
    for first in range(start, masked_start, S.tile):
        state = attend_tile(state, query, pool, first, end, False, S)
    for first in tl.range(masked_start, end, S.tile, num_stages=1):
        state = attend_tile(state, query, pool, first, end, True, S)
    m, l, acc = state
    l = tl.sum(l, axis=1)
    factor = tl.where(l == 0.0, 0.0, 1.0 / l)
    if S.records.v.per_tensor:
        factor *= tl.load(k_scale_ptr)
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l) - S.p_shift)
    return scale_parts(acc, factor, S), lse


@triton.jit
def attend_tile(state, query, pool, first, end, MASKED: tl.constexpr, S: tl.constexpr):
    """One step of the online softmax, over S.tile keys from ``first``. With MASKED, not every row sees every key."""
    R: tl.constexpr = S.records
    LATENT: tl.constexpr = R.v
    CAPS: tl.constexpr = R.caps
    m, l, acc = state
    q_latent, latent_scale, q_rope, rope_scale, q_pos = query
    pages_ptr, table_ptr, num_pages, max_pages = pool
    token = first + tl.arange(0, S.tile)
    page, offset, in_pool = load_page_ids(table_ptr, first, num_pages, max_pages, MASKED, S.tile, R)
    records = record_offsets(page, tl.zeros_like(page), R)
    exists = token < end
    codes = _load_codes(pages_ptr, records, offset, exists & in_pool, MASKED, S)
    exponent = tl.where(in_pool, 0.0, float("nan"))
    if MASKED and S.queries > 1 and not LATENT.per_token_head:
        # NaN and infinities would reach the rows that do not see them. All rows that do get NaN.
        wild = _wild_rows(codes[0], S)
        if not has_halves(S):
            codes = (tl.where(wild[:, None], tl.zeros_like(codes[0]), codes[0]),)
        else:
            wild = wild | _wild_rows(codes[1], S)
            codes = (
                tl.where(wild[:, None], tl.zeros_like(codes[0]), codes[0]),
                tl.where(wild[:, None], tl.zeros_like(codes[1]), codes[1]),
            )
        exponent = tl.where(wild, float("nan"), exponent)
    v = _decode(codes, S)

    if S.rows >= MANY_ROWS:  # before the latent's dots or after them: whatever spills fewer registers
        rope = _rope_scores(q_rope, pages_ptr, records, offset, S)
    if S.v_parts == 1:
        x = tl.dot(q_latent[0], tl.trans(v[0]), input_precision="ieee") * latent_scale[:, None]
    else:
        # One dot into the sum of another would be a chain that nothing hides, and tensor cores truncate. Scaled one
        # by one they are independent. Codes are decoded once more, in the order of registers that these dots want.
        if not has_halves(S):
            k = _decode((tl.trans(codes[0]),), S)
        else:
            k = tl.trans(v[0]), tl.trans(v[1])
        x = tl.dot(q_latent[0], k[0], input_precision="ieee") * latent_scale[:, None]
        x += tl.dot(q_latent[1], k[1], input_precision="ieee") * latent_scale[:, None]
    known = exponent
    if LATENT.per_token_head:
        row_scale = _load_scales(pages_ptr, records, offset, exists, MASKED, LATENT)
        x = x * row_scale[None, :]
        known = tl.maximum(row_scale, MIN_SCALE)  # of a NaN and a number, the number, but in the interpreter
        if CAPS == "portable":
            known = tl.where(row_scale == row_scale, known, MIN_SCALE)
        if S.fold_v_scales:
            exponent += approximate_log2(known, CAPS)
    if S.rows < MANY_ROWS:
        rope = _rope_scores(q_rope, pages_ptr, records, offset, S)
    x = x + (rope * rope_scale[:, None] + exponent[None, :])
    if MASKED:
        visible = exists[None, :]
        if S.causal and S.queries > 1:
            visible = visible & (token[None, :] <= q_pos[:, None])
        x = tl.where(visible, x, float("-inf"))

    if S.rows >= MANY_ROWS:
        # Always true, but it hides from Triton that a dot follows those of the scores. It would have every group of
        # four warps compute all scores, where now they share them.
        alpha = tl.full([S.rows], 1.0, tl.float32)
        p = to_v_operand(tl.full([S.rows, S.tile], 0.0, tl.float32), S)
        if first < end:
            m, l, alpha, p = _softmax(m, l, x, known, S)
    else:
        m, l, alpha, p = _softmax(m, l, x, known, S)
    acc = scale_parts(acc, alpha, S)
    if S.v_parts == 1:
        acc = (tl.dot(p, v[0], acc[0], input_precision="ieee"),)
    else:
        acc = (
            tl.dot(p, v[0], acc[0], input_precision="ieee"),
            tl.dot(p, v[1], acc[1], input_precision="ieee"),
        )
    return m, l, acc


@triton.jit
def _softmax(m, l, x, known, S: tl.constexpr):
    """One step of the online softmax over scores x: the new maximum and sums, what scales the old, probabilities."""
    CAPS: tl.constexpr = S.records.caps
    m_new = tl.maximum(m, tl.max(x, axis=1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    w = tl.exp2(x - (m_safe - S.p_shift)[:, None])
    p = w
    if S.records.v.per_token_head:
        if S.fold_v_scales:
            w = w * approximate_reciprocal(known, CAPS)[None, :]
        else:
            p = w * known[None, :]
    if S.rows >= MANY_ROWS:
        w = tl.sum(tl.reshape(w, [S.rows, SHARES, S.tile // SHARES]), axis=2)
    return m_new, l * alpha[:, None] + w, alpha, to_v_operand(p, S)


@triton.jit
def _load_codes(pages_ptr, records, offset, readable, MASKED: tl.constexpr, S: tl.constexpr):
    """Latent rows [tile, part_width]: elements, bytes, or for two parts pairs of bytes or two halves of elements."""
    if not has_halves(S):
        codes = (_load_columns(pages_ptr, records, offset, readable, 0, MASKED, S),)
    else:
        HALF: tl.constexpr = S.records.v.head_dim // 2
        codes = (
            _load_columns(pages_ptr, records, offset, readable, 0, MASKED, S),
            _load_columns(pages_ptr, records, offset, readable, HALF, MASKED, S),
        )
    return codes


@triton.jit
def _load_columns(pages_ptr, records, offset, readable, FIRST: tl.constexpr, MASKED: tl.constexpr, S: tl.constexpr):
    LATENT: tl.constexpr = S.records.v
    MODE: tl.constexpr = LATENT.mode
    WIDTH: tl.constexpr = part_width(S)
    PART: tl.constexpr = LATENT.head_dim // S.v_parts
    c = tl.arange(0, WIDTH)
    if S.v_parts == 2 and LATENT.code_bytes == 1:
        pair = tl.multiple_of(row_offsets(records, offset, LATENT) // 2, 8)
        ptrs = (pages_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + c)[None, :] + pair[:, None]
    else:
        element = tl.multiple_of(row_offsets(records, offset, LATENT) // LATENT.code_bytes, 16 // LATENT.code_bytes)
        ptrs = (typed_ptr(pages_ptr, MODE) + FIRST + c)[None, :] + element[:, None]
    ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, 16)), (1, WIDTH))  # as in attend._scores
    if MASKED:
        codes = tl.load(ptrs, mask=readable[:, None] & (c < PART)[None, :], other=0)
    elif WIDTH != PART:
        codes = tl.load(ptrs, mask=(c < PART)[None, :], other=0)
    else:
        codes = tl.load(ptrs)
    return codes


@triton.jit
def _decode(codes, S: tl.constexpr):
    """Codes as S.v_parts dot operands."""
    MODE: tl.constexpr = S.records.v.mode
    CAPS: tl.constexpr = S.records.caps
    if S.v_parts == 1:
        values = codes[0]
        if S.records.v.code_bytes == 1:
            values = decode_bytes(values, MODE, CAPS)
        parts = (to_v_operand(values, S),)
    else:
        if S.records.v.code_bytes == 1:
            v0, v1 = decode_pairs(codes[0], MODE, CAPS)
        else:
            v0, v1 = codes
        parts = (to_v_operand(v0, S), to_v_operand(v1, S))
    return parts


@triton.jit
def _rope_scores(q_rope, pages_ptr, records, offset, S: tl.constexpr):
    rope = _load_rope(pages_ptr, records, offset, S)
    return tl.dot(q_rope, tl.trans(rope), input_precision="ieee")


@triton.jit
def _load_rope(pages_ptr, records, offset, S: tl.constexpr):
    """Rope rows [tile, padded rope_dim] as a dot operand. Rows that do not exist hold anything: their scores go."""
    ROPE: tl.constexpr = S.records.k
    MODE: tl.constexpr = ROPE.mode
    CAPS: tl.constexpr = S.records.caps
    DIM: tl.constexpr = ROPE.padded_dim
    d = tl.arange(0, DIM)
    element = tl.multiple_of(row_offsets(records, offset, ROPE) // ROPE.code_bytes, 16 // ROPE.code_bytes)
    # As bits, where the latent goes through registers too: for an operand straight from a load, Triton keeps one more
    # buffer than fits.
    AS_BITS: tl.constexpr = S.rows >= MANY_ROWS and S.records.v.code_bytes == 1 and MODE == "bfloat16"
    rope_ptr = typed_ptr(pages_ptr, MODE)
    if AS_BITS:
        rope_ptr = rope_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    ptrs = (rope_ptr + d)[None, :] + element[:, None]
    ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, 16)), (1, DIM))  # as in attend._scores
    if ROPE.head_dim != DIM:
        rope = tl.load(ptrs, mask=(d < ROPE.head_dim)[None, :], other=0)
    else:
        rope = tl.load(ptrs)
    if ROPE.code_bytes == 1:
        rope = decode_bytes(rope, MODE, CAPS)
    if AS_BITS:
        rope = rope.to(tl.bfloat16, bitcast=True)
    return to_k_operand(rope, S)


@triton.jit
def _wild_rows(codes, S: tl.constexpr):
    """Which rows of bfloat16 or e4m3 codes hold a NaN or an infinity."""
    if S.records.v.code_bytes == 2:
        wild = (codes.to(tl.int16, bitcast=True) & 0x7F80) == 0x7F80
    elif S.v_parts == 1:
        wild = (codes & 0x7F) == 0x7F
    else:  # adding 1 to each byte carries into its top bit
        wild = (((codes & 0x7F7F) + 0x0101) & -0x7F80) != 0
    return tl.max(wild.to(tl.int32), axis=1) > 0


@triton.jit
def _load_scales(pages_ptr, records, offset, exists, MASKED: tl.constexpr, LATENT: tl.constexpr):
    if MASKED:
        scales = tl.load(scale_ptrs(pages_ptr, records, offset, LATENT), mask=exists, other=1.0)
    else:
        scales = tl.load(scale_ptrs(pages_ptr, records, offset, LATENT))
    return scales
