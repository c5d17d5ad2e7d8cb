"""One program's pass over a range of keys of an MLA cache, shared by decode and prefill.

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
    MIN_SCALE,
    has_halves,
    load_scales,
    part_width,
    scale_parts,
    to_k_operand,
    to_v_operand,
)
from kvq_core.kernels.codec import approximate_log2, approximate_reciprocal, decode_bytes, decode_pairs
from kvq_core.kernels.pages import load_page_ids, record_offsets, row_offsets, typed_ptr

MANY_ROWS = tl.constexpr(64)
SHARES = tl.constexpr(2)  # groups of four warps that share out the scores of many rows


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
    pages_ptr, table_ptr, num_pages, max_pages = pool
    token = first + tl.arange(0, S.tile)
    page, offset, in_pool = load_page_ids(table_ptr, first, num_pages, max_pages, MASKED, S.tile, R)
    records = record_offsets(page, tl.zeros_like(page), R)
    exists = token < end
    codes = _load_codes(pages_ptr, records, offset, exists & in_pool, MASKED, S)
    exponent = tl.where(in_pool, 0.0, float("nan"))
    if MASKED and S.queries > 1 and not LATENT.per_token_head:
        codes, exponent = _hide_wild(codes, exponent, S)
    v = _decode(codes, S)
    x, rope = _scores(query, codes, v, pages_ptr, records, offset, S)
    known = exponent  # anything: it is read only where there are row scales
    if LATENT.per_token_head:
        row_scale = load_scales(pages_ptr, records, offset, exists, MASKED, LATENT)
        x = x * row_scale[None, :]
        known = tl.maximum(row_scale, MIN_SCALE)  # of a NaN and a number, the number, but in the interpreter
        if CAPS == "portable":
            known = tl.where(row_scale == row_scale, known, MIN_SCALE)
        if S.fold_v_scales:
            exponent += approximate_log2(known, CAPS)
    x = x + (rope + exponent[None, :])
    if MASKED:
        visible = exists[None, :]
        if S.causal and S.queries > 1:
            visible = visible & (token[None, :] <= query[4][:, None])
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
def _scores(query, codes, v, pages_ptr, records, offset, S: tl.constexpr):
    """Scores [rows, keys] of the latent, but for its row scales, and of the rope part, in units of log2."""
    q_latent, latent_scale, q_rope, rope_scale, _ = query
    if S.rows >= MANY_ROWS:  # before the latent's dots or after them: whatever spills fewer registers
        rope = _rope_scores(q_rope, pages_ptr, records, offset, S)
    if S.v_parts == 1:
        x = tl.dot(q_latent[0], tl.trans(v[0]), input_precision="ieee") * latent_scale[:, None]
    else:
        # One dot into the sum of another would be a chain that nothing hides, and tensor cores truncate. Scaled one
        # by one they are independent. Codes are decoded once more, in the order of registers that these dots want.
        if has_halves(S):
            k = tl.trans(v[0]), tl.trans(v[1])
        else:
            k = _decode((tl.trans(codes[0]),), S)
        x = tl.dot(q_latent[0], k[0], input_precision="ieee") * latent_scale[:, None]
        x += tl.dot(q_latent[1], k[1], input_precision="ieee") * latent_scale[:, None]
    if S.rows < MANY_ROWS:
        rope = _rope_scores(q_rope, pages_ptr, records, offset, S)
    return x, rope * rope_scale[:, None]


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
    codes = (_load_columns(pages_ptr, records, offset, readable, 0, MASKED, S),)
    if has_halves(S):
        HALF: tl.constexpr = S.records.v.head_dim // 2
        codes = (codes[0], _load_columns(pages_ptr, records, offset, readable, HALF, MASKED, S))
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
def _hide_wild(codes, exponent, S: tl.constexpr):
    """NaN and infinities would reach the rows that do not see them. With this, all rows that do see them get NaN."""
    wild = _wild_rows(codes[0], S)
    if has_halves(S):
        wild = wild | _wild_rows(codes[1], S)
        codes = (
            tl.where(wild[:, None], tl.zeros_like(codes[0]), codes[0]),
            tl.where(wild[:, None], tl.zeros_like(codes[1]), codes[1]),
        )
    else:
        codes = (tl.where(wild[:, None], tl.zeros_like(codes[0]), codes[0]),)
    return codes, tl.where(wild, float("nan"), exponent)


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
