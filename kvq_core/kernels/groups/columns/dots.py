"""Dots of a tile: its scores, and what its values add to sums. A group of warps decodes while tensor cores multiply."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from kvq_core.kernels.attend import MIN_SCALE
from kvq_core.kernels.codec import approximate_reciprocal
from kvq_core.kernels.groups.columns.codec import decode_k, decode_v, load_k, load_rope, load_v, split_columns
from kvq_core.kernels.groups.columns.shared import CHUNK, CHUNKS, dot_layout, shares_columns
from kvq_core.kernels.groups.line import KEYS


@gluon.constexpr_function
def _splits_values(S):
    """Whether registers are short, so that operands have half the size."""
    return S.rows >= 64


@gluon.constexpr_function
def _splits_keys(S):
    """The same of scores, where only row scales make them short."""
    return S.rows >= 64 and S.records.v.per_token_head


@gluon.jit
def scores(bufs, stage, always_0, S: gl.constexpr):
    """Start the dots [KEYS, heads] of a tile with the queries; with row scales, divided by them.

    Divided by a scale, at least 1e-6 in pages that kvq wrote, dots of rope parts are finite up to 3e32.

    ``always_0`` is 0, but the compiler does not know, and keeps no descriptors in registers. Returns what `log2_scores`
    waits for: the dots, and the last operand.
    """
    DOT: gl.constexpr = dot_layout(S)
    HEADS: gl.constexpr = S.rows
    ROPE_MODE: gl.constexpr = S.records.k.mode
    CAPS: gl.constexpr = S.records.caps
    tile = bufs.codes.index(stage)
    s = gl.zeros([KEYS, HEADS], gl.float32, DOT)
    codes = load_k(tile, 0)
    k = load_rope(bufs.rope.index(stage), ROPE_MODE, DOT)
    s = warpgroup_mma(k, bufs.q_rope.index(always_0).permute((1, 0)), s, use_acc=False, is_async=True)
    if S.records.v.per_token_head:
        scale = bufs.scales.index(stage).load(gl.SliceLayout(1, DOT))
        s, k = warpgroup_mma_wait(0, deps=[s, k])
        s = s * approximate_reciprocal(gl.maximum(scale, MIN_SCALE), CAPS)[:, None]
    for i in gl.static_range(CHUNKS):
        if i + 1 < CHUNKS:
            ahead = load_k(tile, i + 1)
        q = bufs.q.index(always_0).slice(i * CHUNK, CHUNK, 1)
        if _splits_keys(S):
            lower, upper = split_columns(codes)
            s, k = _add_scores(s, k, lower, q.slice(0, CHUNK // 2, 1), S)
            s, k = _add_scores(s, k, upper, q.slice(CHUNK // 2, CHUNK // 2, 1), S)
        else:
            s, k = _add_scores(s, k, codes, q, S)
        if i + 1 < CHUNKS:
            codes = ahead
    return s, k


@gluon.jit
def _add_scores(s, before, codes, q, S: gl.constexpr):
    """Start dots with ``codes``, and wait for those that were started before, with the operand ``before``."""
    DOT: gl.constexpr = dot_layout(S)
    MODE: gl.constexpr = S.records.v.mode
    k = decode_k(codes, MODE, DOT)
    s = warpgroup_mma(k, q.permute((1, 0)), s, is_async=True)
    s, before = warpgroup_mma_wait(1, deps=[s, before])
    return s, k


@gluon.jit
def add_values(acc, p, bufs, stage, FIRST: gl.constexpr, S: gl.constexpr):
    """Add a tile's values, times ``p`` [KEYS, heads] in shared memory, to sums of chunks from ``FIRST`` on."""
    COUNT: gl.constexpr = CHUNKS // 2 if shares_columns(S) else CHUNKS
    tile = bufs.codes.index(stage)
    codes = load_v(tile, FIRST)
    v = codes  # there is none before
    totals = ()
    for i in gl.static_range(COUNT):
        if i + 1 < COUNT:
            ahead = load_v(tile, FIRST + i + 1)
        if _splits_values(S):
            early, late = split_columns(codes)
            total, v = _add_chunk(acc[i], v, early, p.slice(0, KEYS // 2, 0), i > 0, S)
            total, v = _add_chunk(total, v, late, p.slice(KEYS // 2, KEYS // 2, 0), True, S)
        else:
            total, v = _add_chunk(acc[i], v, codes, p, i > 0, S)
        totals = totals + (total,)
        if i + 1 < COUNT:
            codes = ahead
    return warpgroup_mma_wait(0, deps=totals + (v,))[:COUNT]


@gluon.jit
def _add_chunk(total, before, codes, p, HAS_BEFORE: gl.constexpr, S: gl.constexpr):
    """Start dots with ``codes``, and wait for those that were started before, with the operand ``before``."""
    DOT: gl.constexpr = dot_layout(S)
    MODE: gl.constexpr = S.records.v.mode
    v = decode_v(codes, MODE, DOT)
    total = warpgroup_mma(v, p, total, is_async=True)
    if HAS_BEFORE:
        before = warpgroup_mma_wait(1, deps=[before])
    return total, v
