"""Queries of a segment as right operands in shared memory."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.attend import LOG2E
from kvq_core.kernels.groups.columns.codec import in_order_of_codes
from kvq_core.kernels.groups.columns.shared import RANK, ROPE
from kvq_core.kernels.groups.line import load_queries
from kvq_core.kernels.mla import largest_bits, powers

HEADS = gl.constexpr(16)  # moved at once
LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
ROPE_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
MAX_RATIO = gl.constexpr(60 << 23)  # 2^60 as a difference of float32 bits


@gluon.jit
def store_queries(bufs, barriers, line, queries, block, k_scale_ptr, phase, S: gl.constexpr):
    """All heads of a program, once the queries before them are not needed any more."""
    mbarrier.wait(barriers.queries.index(1), phase ^ 1)
    for i in gl.static_range(S.rows // HEADS):
        _store_heads(bufs, line, queries, block, k_scale_ptr, i * HEADS, S)
    fence_async_shared()
    mbarrier.arrive(barriers.queries.index(0), count=1)


@gluon.jit
def _store_heads(bufs, line, queries, block, k_scale_ptr, FIRST: gl.constexpr, S: gl.constexpr):
    """HEADS heads of a program as operands, and what turns their dots into scores in units of log2."""
    IS_CODED: gl.constexpr = S.records.k.code_bytes == 1
    first = block * S.rows + FIRST
    head = first + gl.arange(0, HEADS, layout=gl.SliceLayout(1, LAYOUT))
    latent = load_queries(queries, line, head, 0, RANK, LAYOUT, S)
    head = first + gl.arange(0, HEADS, layout=gl.SliceLayout(1, ROPE_LAYOUT))
    rope = load_queries(queries, line, head, RANK, ROPE, ROPE_LAYOUT, S)
    factor = gl.full([HEADS], S.sm_scale * LOG2E, gl.float32, gl.SliceLayout(1, LAYOUT))
    if S.normalize_q:
        power, inverse = _powers(latent, rope, S)
        factor = factor * power
        latent = latent.to(gl.float32) * inverse[:, None]
        rope = rope.to(gl.float32) * gl.convert_layout(inverse, gl.SliceLayout(1, ROPE_LAYOUT))[:, None]
    if S.records.v.per_tensor:
        factor = factor * gl.load(k_scale_ptr)
    if IS_CODED:
        rope = in_order_of_codes(rope, True)
    latent = in_order_of_codes(latent, False)
    bufs.q.index(0).slice(FIRST, HEADS, 0).store(latent.to(bufs.q.dtype))
    bufs.q_rope.index(0).slice(FIRST, HEADS, 0).store(rope.to(bufs.q_rope.dtype))
    bufs.factor.slice(FIRST, HEADS, 0).store(factor)


@gluon.jit
def _powers(latent, rope, S: gl.constexpr):
    """`kvq_core.kernels.mla.powers` of both parts of q.

    In bfloat16 the rope part stays below 2^75, so that its dots are finite, and where it is 2^60 times the latent and
    more, the latent is what rounds away.
    """
    of_rope = gl.convert_layout(largest_bits(rope), gl.SliceLayout(1, LAYOUT))
    if S.k_operand != "float16":
        of_rope = gl.minimum(of_rope, 0x7F000000) - MAX_RATIO
    return powers(gl.maximum(largest_bits(latent), of_rope))
