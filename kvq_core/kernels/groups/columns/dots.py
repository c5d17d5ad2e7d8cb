"""Dots of a tile: its scores, and what its values add to sums, after which the tile is free.

A group of warps decodes while tensor cores multiply: one start of dots is in flight while the next operand is decoded.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from kvq_core.kernels.groups.columns.codec import decode_k, decode_v, load_k, load_rope, load_v, split_columns
from kvq_core.kernels.groups.columns.shared import CHUNK, CHUNKS, dot_layout, parts_of
from kvq_core.kernels.groups.line import KEYS


@gluon.constexpr_function
def _splits_keys(S):
    """Whether registers are short, so that operands of scores have half the size."""
    return S.rows >= 64 and S.records.v.per_token_head


@gluon.jit
def scores(bufs, stage, always_0, S: gl.constexpr):
    """Start the dots [KEYS, heads] of a tile with the queries, those of latents times their row scales.

    Rope parts come last, after that product. Without row scales they come first: last, registers spill (log 14 A).

    ``always_0`` is 0, but the compiler does not know, and keeps no descriptors in registers. Returns what `log2_scores`
    waits for: the sums, and their last operand.
    """
    DOT: gl.constexpr = dot_layout(S)
    MODE: gl.constexpr = S.records.v.mode
    HEADS: gl.constexpr = S.rows
    tile = bufs.codes.index(stage)
    codes = load_k(tile, 0)
    s = gl.zeros([KEYS, HEADS], gl.float32, DOT)
    before = ()
    if not S.records.v.per_token_head:
        s, before = _start_rope_scores(s, before, bufs, stage, always_0, S)
    for i in gl.static_range(CHUNKS):
        if i + 1 < CHUNKS:
            ahead = load_k(tile, i + 1)
        q = bufs.q.index(always_0).slice(i * CHUNK, CHUNK, 1).permute((1, 0))
        if _splits_keys(S):
            lower, upper = split_columns(codes)
            s, before = _start(s, decode_k(lower, MODE, S), q.slice(0, CHUNK // 2, 0), before)
            s, before = _start(s, decode_k(upper, MODE, S), q.slice(CHUNK // 2, CHUNK // 2, 0), before)
        else:
            s, before = _start(s, decode_k(codes, MODE, S), q, before)
        if i + 1 < CHUNKS:
            codes = ahead
    if S.records.v.per_token_head:
        scale = bufs.scales.index(stage).load(gl.SliceLayout(1, DOT))
        s, _ = warpgroup_mma_wait(0, deps=(s,) + before)
        s, before = _start_rope_scores(s * scale[:, None], (), bufs, stage, always_0, S)
    return (s,) + before


@gluon.jit
def _start_rope_scores(s, before, bufs, stage, always_0, S: gl.constexpr):
    k = load_rope(bufs.rope.index(stage), S)
    return _start(s, k, bufs.q_rope.index(always_0).permute((1, 0)), before)


@gluon.jit
def add_values(acc, bufs, barriers, stage, FIRST: gl.constexpr, S: gl.constexpr):
    """Add a tile's values, times its probabilities, to sums of chunks of columns from ``FIRST`` on.

    Lets go of each part of the tile once its codes are in registers; of the last, and with it of probabilities, row
    scales and rope parts, once all is added: dots read probabilities where they lie.
    """
    COUNT: gl.constexpr = len(acc)
    PARTS: gl.constexpr = parts_of(S)
    SIZE: gl.constexpr = KEYS // PARTS
    tile = bufs.codes.index(stage)
    codes = load_v(tile, FIRST, 0, SIZE)
    before = ()
    for part in gl.static_range(PARTS):
        p = bufs.p.index(stage).slice(part * SIZE, SIZE, 0)
        totals = ()
        for i in gl.static_range(COUNT):
            if i + 1 < COUNT:
                ahead = load_v(tile, FIRST + i + 1, part, SIZE)
            elif part + 1 < PARTS:
                ahead = load_v(tile, FIRST, part + 1, SIZE)
            if i + 2 == COUNT and part + 1 < PARTS:
                mbarrier.arrive(barriers.empty.index(stage * PARTS + part), count=1)
            total, before = _start(acc[i], decode_v(codes, S), p, before)
            totals = totals + (total,)
            if i + 1 < COUNT or part + 1 < PARTS:
                codes = ahead
        acc = totals
    acc = warpgroup_mma_wait(0, deps=acc + before)[:COUNT]
    mbarrier.arrive(barriers.empty.index(stage * PARTS + (PARTS - 1)), count=1)
    return acc


@gluon.jit
def _start(sums, operand, b, before):
    """Start dots of ``operand`` and ``b``, added to ``sums``, and wait for those before them, if there are any.

    ``before``: (the operand of those,), or (). That is what a wait names, to keep it in registers until then; sums are
    in flight until a wait for all. Returns sums, and ``before`` for the next.
    """
    sums = warpgroup_mma(operand, b, sums, is_async=True)
    if len(before) > 0:
        warpgroup_mma_wait(1, deps=before)
    return sums, (operand,)
