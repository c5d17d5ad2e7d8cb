"""A consumer: scores and softmax of every second tile, and half of the output's columns over all tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvq_core.kernels.attend import LOG2E
from kvq_core.kernels.decode import partial_lse
from kvq_core.kernels.groups.line import KEYS, LAZY, keys_of_segment, next_segment, token_of_query
from kvq_core.kernels.groups.rows.shared import HALF, ROWS

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORE_KEYS = gl.constexpr(gl.SliceLayout(0, SCORES.value))
IN_EVERY_WARP = gl.constexpr(gl.BlockedLayout([ROWS.value // 32], [32], [4], [0]))


@gluon.jit
def consume(bufs, barriers, line, result, W: gl.constexpr, S: gl.constexpr):
    """All segments of a part, as consumer ``W``."""
    pairs_done = line.tile.to(gl.int32) * 0
    segments_done = pairs_done
    while line.tile < line.last_tile:
        start, end, seq_end = keys_of_segment(line, S)
        if start < end:
            phase = segments_done & 1
            mbarrier.wait(barriers.queries.index(0), phase)
            acc, m, l = _attend_keys(bufs, barriers, start, end, pairs_done, W, S)
            # Each has summed up its own tiles. The maxima of the other are read by nobody else: sums take their place.
            bufs.stats.index(2 * (1 - W)).store(l)
            mbarrier.arrive(barriers.finished, count=1)
            mbarrier.wait(barriers.finished, phase)
            l += bufs.stats.index(2 * W).load(SCORE_ROWS)
            mbarrier.arrive(barriers.queries.index(1), count=1)
            _store_part(acc, m, l, line, result, W, S)
            pairs_done += gl.cdiv(end - start, S.tile)
            segments_done += 1
        line = next_segment(line, seq_end, S)


@gluon.jit
def _attend_keys(bufs, barriers, start, end, pairs_done, W: gl.constexpr, S: gl.constexpr):
    """Sums over keys ``start`` to ``end``: of half of the columns, and of the probabilities of one's own tiles."""
    acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
    m = gl.full([ROWS], float("-inf"), gl.float32, SCORE_ROWS)
    l = gl.zeros([ROWS], gl.float32, SCORE_ROWS)
    for i in range(gl.cdiv(end - start, S.tile)):
        turn = pairs_done + i
        left = end - (start + i * S.tile + W * KEYS)
        if W == 1:
            acc, m, l = _add_others(acc, l, bufs, barriers, turn, W)
        s = _scores(bufs, barriers, turn, W)
        p, alpha, m = _softmax(s, m, left, S)
        _publish(p, m, alpha, bufs, barriers, W)
        l = l * alpha + gl.sum(p, 1)
        acc = _add_own(acc, p, alpha, bufs, barriers, W)
        if W == 0:
            acc, m, l = _add_others(acc, l, bufs, barriers, turn, W)
    return acc, m, l


@gluon.jit
def _scores(bufs, barriers, turn, W: gl.constexpr):
    """The dots [ROWS, KEYS] of q with the keys of stage W.

    Every step of a dot truncates its sums, and nothing else rounds as much: two sums take half of the steps each.
    """
    phase = turn & 1
    zero = turn >> 30  # always, but the compiler does not know, and keeps no descriptors in registers
    lower = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    upper = lower
    # Copies are asynchronous: tensor cores see memory through another proxy, hence the fences.
    mbarrier.wait(barriers.ready.index(2 * W), phase)
    fence_async_shared()
    k = bufs.latent[0].index(W + zero).permute((1, 0))
    lower = warpgroup_mma(bufs.q[0].index(zero), k, lower, use_acc=False, is_async=True)
    mbarrier.wait(barriers.ready.index(2 * W + 1), phase)
    fence_async_shared()
    k = bufs.latent[1].index(W + zero).permute((1, 0))
    upper = warpgroup_mma(bufs.q[1].index(zero), k, upper, use_acc=False, is_async=True)
    mbarrier.wait(barriers.ready.index(4 + W), phase)
    fence_async_shared()
    lower = warpgroup_mma(bufs.q[2].index(zero), bufs.rope.index(W + zero).permute((1, 0)), lower, is_async=True)
    lower, upper = warpgroup_mma_wait(0, deps=[lower, upper])
    return lower + upper


@gluon.jit
def _softmax(s, m, left, S: gl.constexpr):
    """One step of the online softmax over a tile of which ``left`` keys exist.

    Returns probabilities, what scales older sums, and what stands for the maximum.
    """
    x = s * (S.sm_scale * LOG2E)
    if left < KEYS:
        x = gl.where((gl.arange(0, KEYS, layout=SCORE_KEYS) < left)[None, :], x, float("-inf"))
    largest = gl.max(x, 1)
    m_new = gl.where(largest - m > LAZY, largest, m)
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    return gl.exp2(x - m_safe[:, None]), gl.exp2(m - m_safe), m_new


@gluon.jit
def _publish(p, m, alpha, bufs, barriers, W: gl.constexpr):
    bufs.p.store(p.to(bufs.p.dtype))
    bufs.stats.index(2 * W).store(m)
    bufs.stats.index(2 * W + 1).store(alpha)
    fence_async_shared()
    mbarrier.arrive(barriers.published.index(W), count=1)


@gluon.jit
def _add_own(acc, p, alpha, bufs, barriers, W: gl.constexpr):
    """Add one's own tile, and free the half of its stage that belongs to these columns."""
    v = bufs.latent[W].index(W)
    if _any_scaled(bufs, W):
        acc = _scale_rows(acc, alpha)
    operand = gl.convert_layout(p.to(v.dtype), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    acc = warpgroup_mma(operand, v, acc, is_async=True)
    acc, operand = warpgroup_mma_wait(0, deps=[acc, operand])
    mbarrier.arrive(barriers.empty.index(2 * W + W), count=1)
    return acc


@gluon.jit
def _add_others(acc, l, bufs, barriers, turn, W: gl.constexpr):
    """Add the other consumer's tile: the new sums, the maximum of the rows up to it, and one's own sums of rows."""
    OTHER: gl.constexpr = 1 - W
    phase = turn & 1
    mbarrier.wait(barriers.published.index(OTHER), phase)
    mbarrier.wait(barriers.ready.index(2 * OTHER + W), phase)  # complete already: copies must be visible here too
    fence_async_shared()
    m = bufs.stats.index(2 * OTHER).load(SCORE_ROWS)
    alpha = bufs.stats.index(2 * OTHER + 1).load(SCORE_ROWS)
    if _any_scaled(bufs, OTHER):
        acc = _scale_rows(acc, alpha)
    acc = warpgroup_mma(bufs.p, bufs.latent[W].index(OTHER), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(barriers.empty.index(2 * OTHER + W), count=1)
    return acc, m, l * alpha


@gluon.jit
def _any_scaled(bufs, W: gl.constexpr):
    """Whether the tile of consumer ``W`` raised the maximum of a row."""
    alpha = bufs.stats.index(2 * W + 1).load(IN_EVERY_WARP)
    return gl.max((alpha != 1.0).to(gl.int32), 0) != 0


@gluon.jit
def _scale_rows(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]


@gluon.jit
def _store_part(acc, m, l, line, result, W: gl.constexpr, S: gl.constexpr):
    """Store the part's values of half of the columns, and (consumer 0) its log-sum-exps."""
    partial_ptr, program, block = result
    part_ptr = partial_ptr + (program + line.seq) * S.part_stride
    out = _scale_rows(acc, gl.where(l == 0.0, 0.0, 1.0 / l))
    row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
    _, valid = token_of_query(line, row, S)
    gl.store(part_ptr + row[:, None] * (2 * HALF) + column[None, :], out, mask=valid[:, None])
    if W == 0:
        lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l))
        row = block * ROWS + gl.arange(0, ROWS, layout=SCORE_ROWS)
        _, valid = token_of_query(line, row, S)
        gl.store(partial_lse(part_ptr, S) + row, lse, mask=valid)
