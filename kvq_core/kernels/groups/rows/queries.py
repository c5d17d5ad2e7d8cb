"""Queries of a segment as left operands in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.groups.line import load_queries
from kvq_core.kernels.groups.rows.shared import HALF, ROWS

COLUMNS = gl.constexpr(64)  # moved at once
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def store_queries(bufs, barriers, line, queries, block, phase, S: gl.constexpr):
    """All heads of a program, once the queries before them are not needed any more."""
    mbarrier.wait(barriers.queries.index(1), phase ^ 1)
    head = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    for i in gl.static_range((2 * HALF) // COLUMNS + 1):
        x = load_queries(queries, line, head, COLUMNS * i, COLUMNS, LAYOUT, S)
        bufs.q[i * COLUMNS // HALF].index(0).slice(i * COLUMNS % HALF, COLUMNS, 1).store(x)
    fence_async_shared()
    mbarrier.arrive(barriers.queries.index(0), count=1)
