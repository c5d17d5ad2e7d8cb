"""A consumer: the tiles of its turn."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.groups.columns.dots import add_values, scores
from kvq_core.kernels.groups.columns.queries import store_queries
from kvq_core.kernels.groups.columns.results import store_columns, store_tiles
from kvq_core.kernels.groups.columns.shared import CHUNK, CHUNKS, dot_layout, shares_columns, stages_of
from kvq_core.kernels.groups.columns.softmax import (
    LOWEST,
    add_probabilities,
    has_to_raise,
    log2_scores,
    no_probabilities,
    raise_maxima,
    scale_chunks,
    scale_probabilities,
)
from kvq_core.kernels.groups.line import KEYS, keys_of_segment, next_segment

FLAG = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def consume(bufs, barriers, line, queries, result, W: gl.constexpr, S: gl.constexpr):
    """All segments of a part, as consumer ``W``."""
    _, _, block, k_scale_ptr = result
    tiles_done = line.tile.to(gl.int32) * 0
    segments_done = tiles_done
    while line.tile < line.last_tile:
        start, end, seq_end = keys_of_segment(line, S)
        if start < end:
            phase = segments_done & 1
            if W == 0:
                store_queries(bufs, barriers, line, queries, block, k_scale_ptr, phase, S)
            mbarrier.wait(barriers.queries.index(0), phase)
            if shares_columns(S):
                acc, l = _attend_columns(bufs, barriers, start, end, tiles_done, W, S)
                mbarrier.arrive(barriers.queries.index(1), count=1)
                store_columns(acc, l, bufs, barriers, phase, line, result, W, S)
            else:
                acc, m, l = _attend_tiles(bufs, barriers, start, end, tiles_done, W, S)
                mbarrier.arrive(barriers.queries.index(1), count=1)
                store_tiles(acc, m, l, bufs, barriers, phase, line, result, W, S)
            tiles_done += gl.cdiv(end - start, S.tile) * (S.tile // KEYS)
            segments_done += 1
        line = next_segment(line, seq_end, S)


@gluon.jit
def _attend_tiles(bufs, barriers, start, end, tiles_done, W: gl.constexpr, S: gl.constexpr):
    """Sums over every second tile: of all columns, and of probabilities; and their maxima."""
    HEADS: gl.constexpr = S.rows
    DOT: gl.constexpr = dot_layout(S)
    STAGES: gl.constexpr = stages_of(S)
    zero = gl.zeros([CHUNK, HEADS], gl.float32, DOT)
    acc = (zero, zero, zero, zero, zero, zero, zero, zero)
    m = gl.full([HEADS], LOWEST, gl.float32, gl.SliceLayout(0, DOT))
    l = no_probabilities(S)
    for i in range(W, gl.cdiv(end - start, KEYS), 2):
        turn = tiles_done + i
        stage = turn % STAGES
        mbarrier.wait(barriers.ready.index(stage), turn // STAGES & 1)
        dots = scores(bufs, stage, turn >> 30, S)
        x = log2_scores(dots, end - (start + i * KEYS), bufs, stage, S)
        if has_to_raise(x, m, S):
            m, alpha = raise_maxima(x, m, S)
            l = scale_probabilities(l, alpha)
            acc = scale_chunks(acc, alpha, CHUNKS)
        p = gl.exp2(x - m[None, :])
        l = add_probabilities(l, p, bufs, stage, S)
        bufs.p.index(stage).store(p.to(gl.float16))
        fence_async_shared()
        acc = add_values(acc, bufs, barriers, stage, 0, S)
    return acc, m, l


# Consumers that share out the columns have one maximum for both, which goes from tile to tile. While one is at its
# softmax, the other multiplies: the values of the tile before, its own, and the next scores.


@gluon.jit
def _attend_columns(bufs, barriers, start, end, tiles_done, W: gl.constexpr, S: gl.constexpr):
    """Sums over all tiles of half of the columns, and of the probabilities of every second."""
    FIRST: gl.constexpr = W * (CHUNKS // 2)
    HEADS: gl.constexpr = S.rows
    DOT: gl.constexpr = dot_layout(S)
    STAGES: gl.constexpr = stages_of(S)
    zero = gl.zeros([CHUNK, HEADS], gl.float32, DOT)
    acc = (zero, zero, zero, zero)
    l = no_probabilities(S)
    if W == 0:
        bufs.maxima.store(gl.full([HEADS], LOWEST, gl.float32, gl.SliceLayout(0, DOT)))
    pairs = gl.cdiv(end - start, S.tile)
    for i in range(pairs):
        turn = tiles_done + 2 * i + W
        stage = turn % STAGES
        mbarrier.wait(barriers.ready.index(stage), turn // STAGES & 1)
        dots = scores(bufs, stage, turn >> 30, S)
        x = log2_scores(dots, end - (start + i * S.tile + W * KEYS), bufs, stage, S)
        if W == 1 or i > 0:
            acc, l = _follow(acc, l, bufs, barriers, turn - 1, W, S)
        l, raised = _publish(x, l, bufs, barriers, turn, W, S)
        if W == 1 or i > 0:
            acc = add_values(acc, bufs, barriers, (turn - 1) % STAGES, FIRST, S)
        if raised:
            acc = scale_chunks(acc, bufs.alphas.index(W).load(gl.SliceLayout(0, DOT)), CHUNKS // 2)
        acc = add_values(acc, bufs, barriers, stage, FIRST, S)
    if W == 0:
        last = tiles_done + 2 * pairs - 1
        acc, l = _follow(acc, l, bufs, barriers, last, W, S)
        acc = add_values(acc, bufs, barriers, last % STAGES, FIRST, S)
    return acc, l


@gluon.jit
def _follow(acc, l, bufs, barriers, turn, W: gl.constexpr, S: gl.constexpr):
    """Wait for the other's probabilities of the tile ``turn``, and scale sums as it did. Its values are added later."""
    OTHER: gl.constexpr = 1 - W
    mbarrier.wait(barriers.published.index(OTHER), turn // 2 & 1)
    if gl.max(bufs.raised.index(OTHER).load(FLAG), 0) != 0:
        alpha = bufs.alphas.index(OTHER).load(gl.SliceLayout(0, dot_layout(S)))
        l = scale_probabilities(l, alpha)
        acc = scale_chunks(acc, alpha, CHUNKS // 2)
    return acc, l


@gluon.jit
def _publish(x, l, bufs, barriers, turn, W: gl.constexpr, S: gl.constexpr):
    """Publish the probabilities of one's own tile. Returns the new sums, and whether a maximum was raised."""
    STAGES: gl.constexpr = stages_of(S)
    stage = turn % STAGES
    m = bufs.maxima.load(gl.SliceLayout(0, dot_layout(S)))
    raised = has_to_raise(x, m, S)
    if raised:
        m, alpha = raise_maxima(x, m, S)
        bufs.maxima.store(m)
        bufs.alphas.index(W).store(alpha)
        l = scale_probabilities(l, alpha)
    p = gl.exp2(x - m[None, :])
    l = add_probabilities(l, p, bufs, stage, S)
    # The stage is filled, so both have added the tile before in it, and its probabilities can go.
    bufs.p.index(stage).store(p.to(gl.float16))
    bufs.raised.index(W).store(gl.full([1], 0, gl.int32, FLAG) + raised.to(gl.int32))
    fence_async_shared()
    mbarrier.arrive(barriers.published.index(W), count=1)
    return l, raised
