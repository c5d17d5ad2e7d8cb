"""One program's pass over a range of keys, shared by decode and prefill.

Codes are exact in the operand dtype, so scales stay out of the dots. A K row scale multiplies a column of scores. A V
row scale enters the softmax as an exponent: ``w = 2^(s + log2(v_scale) - m)``, with m the running maximum of the whole
exponent, multiplies the codes of V and stays within [0, 1] whatever the size of V; ``w / v_scale`` is what the
denominator adds up. Scores are in units of log2, and probabilities are held times ``2^S.p_shift``.

Tiles are named as they lie with ``S.keys_first``: scores [keys, rows], K [keys, d], q [d, rows], V [columns, keys],
output [columns, rows]. So few rows fill the narrow side of a tensor core's tile (8 where the other has 16), and several
warps share out the keys and the columns, so that none converts what another has converted. Many rows take the transpose
of every tile: there each warp has rows of its own, and the softmax stays within a warp. `first` and `second` place a
vector along the named axes.

V goes through one dot or (``S.v_parts``) two. Few rows take operands from registers, and there a dot operand of single
bytes whose contraction axis is not contiguous would be read from shared memory byte by byte. So V of 8 bits is read as
pairs of neighbouring codes, which ``ldmatrix`` transposes, and each byte of the pairs gets a dot of its own. Many rows
take V from shared memory after it was converted, and wider V needs no conversion: one dot. K of 8 bits is read as pairs
too (``S.k_parts``) for the dots of four warps, which would have Triton read it two bytes at a time.
"""

import triton
import triton.language as tl

from kvq_core.kernels.codec import (
    approximate_log2,
    approximate_reciprocal,
    bias_of,
    decode_biased,
    decode_biased_pairs,
    decode_bytes,
    decode_pairs,
    round_for,
)
from kvq_core.kernels.pages import load_page_ids, record_offsets, row_offsets, scale_ptrs, typed_ptr

LOG2E = tl.constexpr(1.4426950408889634)
# Scales from here down (a slot never written has 0) count as this one, so that logarithm and quotient stay finite, and
# the sum of 2^31 quotients, each times a probability of up to 2^15 (S.p_shift), too.
MIN_SCALE = tl.constexpr(2.0**-80)


@triton.jit
def first(x, S: tl.constexpr):
    """A vector along the first axis of a tile as named above."""
    if S.keys_first:
        y = x[:, None]
    else:
        y = x[None, :]
    return y


@triton.jit
def second(x, S: tl.constexpr):
    """A vector along the second axis of a tile as named above."""
    if S.keys_first:
        y = x[None, :]
    else:
        y = x[:, None]
    return y


@triton.constexpr_function
def first_axis(S):
    """The axis of tensors that is the first one of tiles as named above."""
    return 0 if S.keys_first else 1


@triton.constexpr_function
def tile_shape(rows, columns, S):
    """The shape of a tensor that is a tile [rows, columns] as named above."""
    return [rows, columns] if S.keys_first else [columns, rows]


@triton.jit
def multiply(a, b, acc, S: tl.constexpr):
    """a b + acc of tiles as named above."""
    if S.keys_first:
        product = tl.dot(a, b, acc, input_precision="ieee")
    else:
        product = tl.dot(b, a, acc, input_precision="ieee")
    return product


@triton.jit
def load_queries(q_ptr, k_scale_ptr, alibi_slopes_ptr, token, q_head, q_pos, valid, strides, S: tl.constexpr):
    """q [d, rows] in S.k_parts dot operands, and what makes scores of dots: q, row_scale, row_offset, slope, q_pos."""
    R: tl.constexpr = S.records
    MODE: tl.constexpr = R.k.mode
    CAPS: tl.constexpr = R.caps
    OPERAND: tl.constexpr = S.k_operand
    d = tl.arange(0, R.k.padded_dim)
    stride_token, stride_head = strides
    element = token.to(tl.int64) * (stride_token.to(tl.int64) * S.q_align) + q_head.to(tl.int64) * (
        stride_head.to(tl.int64) * S.q_align
    )
    mask = first(d < R.k.head_dim, S) & second(valid, S)
    q = tl.load(q_ptr + first(d, S) + second(element, S), mask=mask, other=0.0)
    row_scale = tl.full([S.rows], S.sm_scale * LOG2E, tl.float32)
    if S.normalize_q:
        q, power = _normalize(q.to(tl.float32), S)
        row_scale *= power
    if R.k.per_tensor:
        row_scale *= tl.load(k_scale_ptr)
    slope = tl.zeros_like(row_scale)
    if S.has_alibi:
        slope = tl.load(alibi_slopes_ptr + q_head, mask=valid, other=0.0) * LOG2E
    q = to_k_operand(q, S)
    row_offset = tl.sum(q.to(tl.float32), axis=first_axis(S)) * row_scale * -bias_of(MODE, CAPS, OPERAND)
    if S.k_parts == 2:
        even, odd = tl.split(tl.reshape(tl.trans(q), [S.rows, R.k.padded_dim // 2, 2]))
        parts = (tl.trans(even), tl.trans(odd))
    else:
        parts = (q,)
    return parts, row_scale, row_offset, slope, q_pos


@triton.jit
def _normalize(q, S: tl.constexpr):
    """Divide each row by a power of two that brings its largest element to [2^14, 2^15), if it is finite."""
    exponent = tl.max(q.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=first_axis(S)) >> 23
    exponent = tl.minimum(tl.maximum(exponent, 15), 253)
    power = ((exponent - 14) << 23).to(tl.float32, bitcast=True)
    inverse = ((268 - exponent) << 23).to(tl.float32, bitcast=True)
    return q * second(inverse, S), power


@triton.jit
def to_k_operand(x, S: tl.constexpr):
    """x as an operand of q k^T."""
    DTYPE: tl.constexpr = S.k_operand
    return _cast(x, DTYPE)


@triton.jit
def to_v_operand(x, S: tl.constexpr):
    """x as an operand of p v."""
    DTYPE: tl.constexpr = S.v_operand
    return _cast(x, DTYPE)


@triton.jit
def _cast(x, DTYPE: tl.constexpr):
    if DTYPE == "float16":
        operand = x.to(tl.float16)
    elif DTYPE == "bfloat16":
        operand = x.to(tl.bfloat16)
    else:
        operand = x.to(tl.float32)
    return operand


@triton.jit
def attend_keys(query, pool, start, end, all_visible_end, v_scale_ptr, S: tl.constexpr):
    """Attend to keys ``start`` to ``end``; those before ``all_visible_end`` are seen by every row.

    Returns the normalized output as S.v_parts parts (see `join_parts`), and the log2 of the sum of exponentials.
    """
    m = tl.full([S.rows], float("-inf"), tl.float32)
    l = tl.full([S.tile // 16, 8, S.rows] if S.late_sums else [S.rows], 0.0, tl.float32)
    part = tl.full(tile_shape(part_width(S), S.rows, S), 0.0, tl.float32)
    if S.v_parts == 1:
        acc = (part,)
    else:
        acc = (part, part)
    poison = tl.full([S.tile], 0.0, tl.float32)
    state = (m, l, acc, poison)
    masked_start = start
    if S.window == 0:
        masked_start = start + tl.maximum(tl.minimum(end, all_visible_end) - start, 0) // S.tile * S.tile
    for key in range(start, masked_start, S.tile):
        state = attend_tile(state, query, pool, key, end, False, S)
    for key in range(masked_start, end, S.tile):
        state = attend_tile(state, query, pool, key, end, True, S)
    return _finish(state, v_scale_ptr, S)


@triton.constexpr_function
def part_width(S):
    """Columns of the tensor that holds a part of a V row, at least the 16 that a dot takes."""
    return max(16, S.records.v.padded_dim // S.v_parts)


@triton.constexpr_function
def has_halves(S):
    """Whether parts are the halves of a V row; else, if there are two, they take its columns in turn."""
    return S.v_parts == 2 and S.records.v.code_bytes != 1


@triton.jit
def attend_tile(state, query, pool, first_key, end, MASKED: tl.constexpr, S: tl.constexpr):
    """One step of the online softmax, S.tile keys from ``first_key``. With MASKED, not every row sees every key."""
    R: tl.constexpr = S.records
    V: tl.constexpr = R.v
    CAPS: tl.constexpr = R.caps
    m, l, acc, poison = state
    pages_ptr, table_ptr, head, num_pages, max_pages = pool
    token = first_key + tl.arange(0, S.tile)
    page, offset, in_pool = load_page_ids(table_ptr, first_key, num_pages, max_pages, MASKED, S.tile, R)
    records = record_offsets(page, head, R)
    x = _scores(query, pages_ptr, records, offset, token, S)
    exists = token < end
    if MASKED and S.window > 0 and S.queries == 1:
        exists = exists & (token > tl.min(query[4], axis=0) - S.window)  # 0 * NaN of a V row before the window is NaN
    exponent = tl.where(in_pool, 0.0, float("nan"))
    if R.v.per_token_head:
        v_scale = load_scales(pages_ptr, records, offset, exists, MASKED, V)
        known = tl.maximum(v_scale, MIN_SCALE)  # of a NaN and a number, the number, but in the interpreter
        if CAPS == "portable":
            known = tl.where(v_scale == v_scale, known, MIN_SCALE)
        if S.fold_v_scales:
            exponent += approximate_log2(known, CAPS)
    x += first(exponent, S)
    visible = first(exists, S)
    if MASKED:
        visible = _visible(query, token, exists, S)
        x = tl.where(visible, x, float("-inf"))

    m_new = tl.maximum(m, tl.max(x, axis=first_axis(S)))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    w = tl.exp2(x - second(m_safe - S.p_shift, S))
    p = w
    if R.v.per_token_head:
        if S.fold_v_scales:
            w = w * first(approximate_reciprocal(known, CAPS), S)
        else:
            p = w * first(known, S)
        if MASKED:
            p = tl.where(visible & first(v_scale != v_scale, S), float("nan"), p)
        else:
            poison += tl.where(v_scale == v_scale, 0.0, float("nan"))
    if S.late_sums:  # the keys that a thread holds; `_finish` adds up the rest
        l = l * alpha[None, None, :] + tl.sum(tl.reshape(w, [S.tile // 16, 2, 8, S.rows]), axis=1)
    else:
        l = l * alpha + tl.sum(w, axis=first_axis(S))
    p = to_v_operand(p, S)
    v = _load_v(pages_ptr, records, offset, exists, MASKED, S)
    acc = scale_parts(acc, alpha, S)
    if S.v_parts == 1:
        acc = (_accumulate(acc[0], p, v[0], visible, MASKED, S),)
    else:
        acc = (
            _accumulate(acc[0], p, v[0], visible, MASKED, S),
            _accumulate(acc[1], p, v[1], visible, MASKED, S),
        )
    return m_new, l, acc, poison


@triton.jit
def scale_parts(parts, factor, S: tl.constexpr):
    """Multiply the rows of all parts by ``factor`` [rows]."""
    f = second(factor, S)
    if S.v_parts == 1:
        scaled = (parts[0] * f,)
    else:
        scaled = (parts[0] * f, parts[1] * f)
    return scaled


@triton.jit
def _scores(query, pages_ptr, records, offset, token, S: tl.constexpr):
    """Scores [keys, rows] in units of log2, before the mask."""
    K: tl.constexpr = S.records.k
    MODE: tl.constexpr = K.mode
    CAPS: tl.constexpr = S.records.caps
    OPERAND: tl.constexpr = S.k_operand
    q, row_scale, row_offset, slope, q_pos = query
    DIM: tl.constexpr = K.padded_dim // S.k_parts
    BYTES: tl.constexpr = K.code_bytes * S.k_parts
    d = tl.arange(0, DIM)
    ALIGN: tl.constexpr = K.align
    element = tl.multiple_of(row_offsets(records, offset, K) // BYTES, ALIGN // BYTES)
    k_ptr = pages_ptr.to(tl.pointer_type(tl.int16), bitcast=True) if S.k_parts == 2 else typed_ptr(pages_ptr, MODE)
    ptrs = k_ptr + first(element, S) + second(d, S)
    # Inside two loops Triton 3.7 forgets this, and would load element by element. It must be said in this function:
    # of an argument of another one it would be lost.
    if S.keys_first:
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, ALIGN)), (1, DIM))
    else:
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (ALIGN, 1)), (DIM, 1))
    k = _load_rows(ptrs, second(d < K.head_dim // S.k_parts, S), K.padded_dim != K.head_dim)
    if S.k_parts == 2:
        k0, k1 = decode_biased_pairs(k, MODE, CAPS, OPERAND)
        x = multiply(to_k_operand(k0, S), q[0], None, S)
        x = multiply(to_k_operand(k1, S), q[1], x, S)
    else:
        if K.code_bytes == 1:
            k = decode_biased(k, MODE, CAPS, OPERAND)
        x = multiply(to_k_operand(k, S), q[0], None, S)
    x = x * second(row_scale, S) + second(row_offset, S)
    if K.per_token_head:
        x = x * first(tl.load(scale_ptrs(pages_ptr, records, offset, K)), S)
    if S.softcap > 0:
        x = S.softcap * LOG2E * _tanh(x * (1.0 / (S.softcap * LOG2E)))
    if S.has_alibi:
        x += second(slope, S) * (first(token, S) - second(q_pos, S)).to(tl.float32)
    return x


@triton.jit
def _load_rows(ptrs, mask, MASKED: tl.constexpr):
    if MASKED:
        rows = tl.load(ptrs, mask=mask, other=0)
    else:
        rows = tl.load(ptrs)
    return rows


@triton.jit
def load_scales(pages_ptr, records, offset, exists, MASKED: tl.constexpr, SIDE: tl.constexpr):
    if MASKED:
        scales = tl.load(scale_ptrs(pages_ptr, records, offset, SIDE), mask=exists, other=1.0)
    else:
        scales = tl.load(scale_ptrs(pages_ptr, records, offset, SIDE))
    return scales


@triton.jit
def _tanh(x):
    """Accurate to a few units in the last place; the polynomial (Cephes, tanhf) where the quotient would cancel."""
    z = x * x
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    quotient = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2E)) + 1.0)
    return tl.where(z < 0.390625, p * z * x + x, tl.where(x < 0, -quotient, quotient))


@triton.jit
def _visible(query, token, exists, S: tl.constexpr):
    _, _, _, _, q_pos = query
    visible = tl.broadcast_to(first(exists, S), tile_shape(S.tile, S.rows, S))
    if S.causal:
        visible = visible & (first(token, S) <= second(q_pos, S))
    if S.window > 0:
        visible = visible & (first(token, S) > second(q_pos, S) - S.window)
    return visible


@triton.jit
def _load_v(pages_ptr, records, offset, exists, MASKED: tl.constexpr, S: tl.constexpr):
    """The parts of V [part_width, keys] as dot operands; zeros for keys that do not exist."""
    V: tl.constexpr = S.records.v
    MODE: tl.constexpr = V.mode
    CAPS: tl.constexpr = S.records.caps
    PART: tl.constexpr = V.head_dim // S.v_parts
    c = tl.arange(0, part_width(S))
    mask = first(c < PART, S)
    if MASKED:
        mask = mask & second(exists, S)
    WIDTH: tl.constexpr = part_width(S)
    ALIGN: tl.constexpr = V.align
    PARTIAL: tl.constexpr = MASKED or WIDTH != PART
    if S.v_parts == 2:
        pair = tl.multiple_of(row_offsets(records, offset, V) // 2, ALIGN // 2)
        ptrs = pages_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + first(c, S) + second(pair, S)
    else:
        element = tl.multiple_of(row_offsets(records, offset, V) // V.code_bytes, ALIGN // V.code_bytes)
        ptrs = typed_ptr(pages_ptr, MODE) + first(c, S) + second(element, S)
    if S.keys_first:  # as in _scores
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (ALIGN, 1)), (WIDTH, 1))
    else:
        ptrs = tl.max_contiguous(tl.multiple_of(ptrs, (1, ALIGN)), (1, WIDTH))
    v = _load_rows(ptrs, mask, PARTIAL)
    if S.v_parts == 2:
        v0, v1 = decode_pairs(v, MODE, CAPS)
        parts = (to_v_operand(v0, S), to_v_operand(v1, S))
    else:
        if V.code_bytes == 1:
            v = decode_bytes(v, MODE, CAPS)
        parts = (to_v_operand(v, S),)
    return parts


@triton.jit
def _accumulate(acc, p, v, visible, MASKED: tl.constexpr, S: tl.constexpr):
    """acc + p v. Where rows differ in what they see, an infinity or NaN of V reaches only the rows that see it."""
    if MASKED and S.queries > 1 and not S.records.v.per_token_head:
        wild = (v - v) != 0.0
        seen = multiply(to_v_operand(wild, S), to_v_operand(visible, S), None, S)
        acc = multiply(tl.where(wild, tl.zeros_like(v), v), p, acc, S)
        acc = tl.where(seen > 0.0, float("nan"), acc)
    else:
        acc = multiply(v, p, acc, S)
    return acc


@triton.jit
def _finish(state, v_scale_ptr, S: tl.constexpr):
    m, l, acc, poison = state
    if S.late_sums:
        l = tl.sum(tl.sum(l, axis=0), axis=0)
    factor = tl.where(l == 0.0, 0.0, 1.0 / l)
    if S.records.v.per_tensor:
        factor *= tl.load(v_scale_ptr)
    if S.records.v.per_token_head:
        factor += tl.sum(poison, axis=0)
    lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l) - S.p_shift)
    return scale_parts(acc, factor, S), lse


@triton.jit
def out_columns(S: tl.constexpr):
    """Columns of the output as `join_parts` has them, and which of them exist."""
    c = tl.arange(0, S.v_parts * part_width(S))
    exist = c < S.records.v.head_dim
    if has_halves(S) and S.records.v.head_dim != S.v_parts * part_width(S):
        exist = c % part_width(S) < S.records.v.head_dim // 2
        c = c % part_width(S) + c // part_width(S) * (S.records.v.head_dim // 2)
    return c, exist


@triton.jit
def join_parts(parts, S: tl.constexpr):
    """The tile that was held in parts."""
    WIDTH: tl.constexpr = S.v_parts * part_width(S)
    if S.v_parts == 1:
        whole = parts[0]
    elif has_halves(S):
        whole = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), [S.rows, WIDTH])
    elif S.keys_first:
        whole = tl.reshape(tl.permute(tl.join(parts[0], parts[1]), (0, 2, 1)), [WIDTH, S.rows])
    else:
        whole = tl.reshape(tl.join(parts[0], parts[1]), [S.rows, WIDTH])
    return whole


@triton.jit
def store_parts(out_ptr, row, stored, parts, S: tl.constexpr):
    """Store rows of output [.., head_dim_v] held in parts."""
    CAPS: tl.constexpr = S.records.caps
    columns, exist = out_columns(S)
    ptrs = out_ptr + first(columns, S) + second(row * S.records.v.head_dim, S)
    values = round_for(out_ptr, join_parts(parts, S), CAPS)
    tl.store(ptrs, values, mask=first(exist, S) & second(stored, S))
