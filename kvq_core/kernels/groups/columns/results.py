"""The end of a segment: both consumers' sums, as a part of the result."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvq_core.kernels.decode import partial_lse
from kvq_core.kernels.groups.columns.codec import in_order_of_columns
from kvq_core.kernels.groups.columns.shared import CHUNK, CHUNKS, RANK, dot_layout
from kvq_core.kernels.groups.line import token_of_query

HALF = gl.constexpr(CHUNKS.value // 2)


@gluon.jit
def store_columns(acc, l, bufs, barriers, phase, line, result, W: gl.constexpr, S: gl.constexpr):
    """Each has all sums of half of the columns, and sums of the probabilities of its own tiles."""
    HEADS: gl.constexpr = gl.SliceLayout(0, dot_layout(S))
    l = gl.convert_layout(gl.sum(l, 0), HEADS)
    bufs.totals.index(2 * W + 1).store(l)
    mbarrier.arrive(barriers.finished.index(0), count=1)
    mbarrier.wait(barriers.finished.index(0), phase)
    l += bufs.totals.index(2 * (1 - W) + 1).load(HEADS)
    factor = gl.where(l == 0.0, 0.0, 1.0 / l)
    for i in gl.static_range(HALF):
        _store_chunk(acc[i], factor, W * HALF + i, line, result, S)
    if W == 0:
        _store_lse(bufs.maxima.load(HEADS), l, line, result, S)


@gluon.jit
def store_tiles(acc, m, l, bufs, barriers, phase, line, result, W: gl.constexpr, S: gl.constexpr):
    """Each has sums over its own tiles: those of half of the columns go to the other."""
    DOT: gl.constexpr = dot_layout(S)
    HEADS: gl.constexpr = gl.SliceLayout(0, DOT)
    OTHER: gl.constexpr = 1 - W
    l = gl.convert_layout(gl.sum(l, 0), HEADS)
    bufs.totals.index(2 * W).store(m)
    bufs.totals.index(2 * W + 1).store(l)
    mbarrier.arrive(barriers.finished.index(0), count=1)
    mbarrier.wait(barriers.finished.index(0), phase)
    m_other = bufs.totals.index(2 * OTHER).load(HEADS)
    m_all = gl.maximum(m, m_other)
    mine = gl.exp2(m - m_all)
    l = l * mine + bufs.totals.index(2 * OTHER + 1).load(HEADS) * gl.exp2(m_other - m_all)
    for i in gl.static_range(HALF):
        bufs.sums.index(OTHER * HALF + i).store(acc[OTHER * HALF + i] * mine[None, :])
    mbarrier.arrive(barriers.finished.index(1), count=1)
    mbarrier.wait(barriers.finished.index(1), phase)
    factor = gl.where(l == 0.0, 0.0, 1.0 / l)
    for i in gl.static_range(HALF):
        total = acc[W * HALF + i] * mine[None, :] + bufs.sums.index(W * HALF + i).load(DOT)
        _store_chunk(total, factor, W * HALF + i, line, result, S)
    if W == 0:
        _store_lse(m_all, l, line, result, S)


@gluon.jit
def _store_chunk(sums, factor, CHUNK_INDEX: gl.constexpr, line, result, S: gl.constexpr):
    """Store the values of a chunk of columns: sums times ``factor``."""
    _, _, block, k_scale_ptr = result
    if S.records.v.per_tensor:
        factor = factor * gl.load(k_scale_ptr)
    out = in_order_of_columns(sums * factor[None, :])
    head = block * S.rows + gl.arange(0, S.rows, layout=gl.SliceLayout(0, out.type.layout))
    column = CHUNK_INDEX * CHUNK + gl.arange(0, CHUNK, layout=gl.SliceLayout(1, out.type.layout))
    _, exists = token_of_query(line, head, S)
    ptrs = _part_ptr(line, result, S) + (head[None, :] * RANK + column[:, None])
    gl.store(ptrs, out, mask=exists[None, :])


@gluon.jit
def _store_lse(m, l, line, result, S: gl.constexpr):
    lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l))
    head = result[2] * S.rows + gl.arange(0, S.rows, layout=gl.SliceLayout(0, dot_layout(S)))
    _, exists = token_of_query(line, head, S)
    gl.store(partial_lse(_part_ptr(line, result, S), S) + head, lse, mask=exists)


@gluon.jit
def _part_ptr(line, result, S: gl.constexpr):
    partial_ptr, program, _, _ = result
    return partial_ptr + (program + line.seq) * S.part_stride
