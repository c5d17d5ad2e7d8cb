"""Queries of a segment as left operands in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.attend import LOG2E
from kvq_core.kernels.groups.shared import FACTOR, HALF, ROWS, rows_of_query

COLUMNS = gl.constexpr(64)  # moved at once
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LAYOUT_ROWS = gl.constexpr(gl.SliceLayout(1, LAYOUT.value))
MAX_RATIO = gl.constexpr(60 << 23)  # 2^60 as a difference of float32 bits


@gluon.jit
def store_queries(bufs, barriers, line, queries, phase, S: gl.constexpr):
    """Rows of q as operands, and what turns their dots into scores in units of log2."""
    q_ptr, q_stride_token, q_stride_head, block, k_scale_ptr = queries
    row = block * ROWS + gl.arange(0, ROWS, layout=LAYOUT_ROWS)
    token, valid = rows_of_query(line, row, S)
    q_rows = q_ptr + token.to(gl.int64) * (q_stride_token.to(gl.int64) * S.q_align)
    q_rows = q_rows + row.to(gl.int64) * (q_stride_head.to(gl.int64) * S.q_align)
    factor = gl.full([ROWS], S.sm_scale * LOG2E, gl.float32, LAYOUT_ROWS)
    inverse = factor
    if S.normalize_q:
        power, inverse = _powers(q_rows, valid, S)
        factor = factor * power
    if S.records.v.per_tensor:
        factor = factor * gl.load(k_scale_ptr)
    mbarrier.wait(barriers.queries.index(1), phase ^ 1)
    for i in gl.static_range((2 * HALF) // COLUMNS + 1):
        x = _load_columns(q_rows, valid, COLUMNS * i)
        if S.normalize_q:
            x = x.to(gl.float32) * inverse[:, None]
        operand = bufs.q[i * COLUMNS // HALF].index(0).slice(i * COLUMNS % HALF, COLUMNS, 1)
        operand.store(x.to(operand.dtype))
    bufs.stats.index(FACTOR).store(factor)
    fence_async_shared()
    mbarrier.arrive(barriers.queries.index(0), count=1)


@gluon.jit
def _powers(q_rows, valid, S: gl.constexpr):
    """As `kvq_core.kernels.mla._powers`: a power of two, and its inverse, which both parts of q are multiplied by.

    In bfloat16 the rope part stays below 2^75, so that its dots are finite, and where it is 2^60 times the latent and
    more, the latent is what rounds away.
    """
    largest = gl.full([ROWS], 0, gl.int32, LAYOUT_ROWS)
    for i in gl.static_range((2 * HALF) // COLUMNS):
        largest = gl.maximum(largest, _largest_bits(_load_columns(q_rows, valid, COLUMNS * i)))
    of_rope = _largest_bits(_load_columns(q_rows, valid, 2 * HALF))
    if S.k_operand != "float16":
        of_rope = gl.minimum(of_rope, 0x7F000000) - MAX_RATIO
    exponent = gl.minimum(gl.maximum(gl.maximum(largest, of_rope) >> 23, 15), 253)
    power = ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    return power, ((268 - exponent) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _load_columns(q_rows, valid, FIRST: gl.constexpr):
    column = FIRST + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    return gl.load(q_rows[:, None] + column[None, :], mask=valid[:, None], other=0.0)


@gluon.jit
def _largest_bits(x):
    """The bits of the largest magnitude of each row, in float32."""
    return gl.max(x.to(gl.float32).to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)
