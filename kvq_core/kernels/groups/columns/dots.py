"""Dots of a tile: its scores, and what its values add to sums. A group of warps decodes while tensor cores multiply."""

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

    ``always_0`` is 0, but the compiler does not know, and keeps no descriptors in registers. Returns what `log2_scores`
    waits for: the dots, and their last operand.
    """
    DOT: gl.constexpr = dot_layout(S)
    HEADS: gl.constexpr = S.rows
    tile = bufs.codes.index(stage)
    codes = load_k(tile, 0)
    dots = (gl.zeros([KEYS, HEADS], gl.float32, DOT),)
    if not S.records.v.per_token_head:
        dots = _start_rope_scores(dots, bufs, stage, always_0, S)
    for i in gl.static_range(CHUNKS):
        if i + 1 < CHUNKS:
            ahead = load_k(tile, i + 1)
        q = bufs.q.index(always_0).slice(i * CHUNK, CHUNK, 1)
        if _splits_keys(S):
            lower, upper = split_columns(codes)
            dots = _add_scores(dots, lower, q.slice(0, CHUNK // 2, 1), S)
            dots = _add_scores(dots, upper, q.slice(CHUNK // 2, CHUNK // 2, 1), S)
        else:
            dots = _add_scores(dots, codes, q, S)
        if i + 1 < CHUNKS:
            codes = ahead
    if S.records.v.per_token_head:
        scale = bufs.scales.index(stage).load(gl.SliceLayout(1, DOT))
        s, _ = warpgroup_mma_wait(0, deps=dots)
        dots = _start_rope_scores((s * scale[:, None],), bufs, stage, always_0, S)
    return dots


@gluon.jit
def _start_rope_scores(dots, bufs, stage, always_0, S: gl.constexpr):
    """Start the dots of rope parts, added to ``dots``, none of which is on the way."""
    MODE: gl.constexpr = S.records.k.mode
    k = load_rope(bufs.rope.index(stage), MODE, dot_layout(S))
    q = bufs.q_rope.index(always_0)
    return warpgroup_mma(k, q.permute((1, 0)), dots[0], is_async=True), k


@gluon.jit
def _add_scores(dots, codes, q, S: gl.constexpr):
    """Start dots with ``codes``, added to ``dots``, and wait for these, if any are on the way with an operand."""
    DOT: gl.constexpr = dot_layout(S)
    MODE: gl.constexpr = S.records.v.mode
    k = decode_k(codes, MODE, DOT)
    s = warpgroup_mma(k, q.permute((1, 0)), dots[0], is_async=True)
    if len(dots) > 1:
        s, _ = warpgroup_mma_wait(1, deps=(s, dots[1]))
    return s, k


@gluon.jit
def add_values(acc, p, bufs, barriers, stage, FIRST: gl.constexpr, S: gl.constexpr):
    """Add a tile's values, times ``p`` [KEYS, heads] in shared memory, to sums of chunks from ``FIRST`` on.

    Parts of the tile are left to the producer as soon as they are added.
    """
    COUNT: gl.constexpr = len(acc)
    PARTS: gl.constexpr = parts_of(S)
    SIZE: gl.constexpr = KEYS // PARTS
    tile = bufs.codes.index(stage)
    codes = load_v(tile, FIRST, 0, SIZE)
    before = ()
    for part in gl.static_range(PARTS):
        for i in gl.static_range(COUNT):
            if i + 1 < COUNT:
                ahead = load_v(tile, FIRST + i + 1, part, SIZE)
            elif part + 1 < PARTS:
                ahead = load_v(tile, FIRST, part + 1, SIZE)
            total, before = _add_chunk(acc[0], before, codes, p.slice(part * SIZE, SIZE, 0), S)
            acc = acc[1:] + (total,)
            if part > 0 and i == 0:
                mbarrier.arrive(barriers.empty.index(stage * PARTS + (part - 1)), count=1)
            codes = ahead
    acc = warpgroup_mma_wait(0, deps=acc + before)[:COUNT]
    mbarrier.arrive(barriers.empty.index(stage * PARTS + (PARTS - 1)), count=1)
    return acc


@gluon.jit
def _add_chunk(total, before, codes, p, S: gl.constexpr):
    """Start dots with ``codes``, and wait for those before them, if there are any, with the operand ``before``."""
    DOT: gl.constexpr = dot_layout(S)
    MODE: gl.constexpr = S.records.v.mode
    v = decode_v(codes, MODE, DOT)
    total = warpgroup_mma(v, p, total, is_async=True)
    if len(before) > 0:
        warpgroup_mma_wait(1, deps=before)
    return total, (v,)
