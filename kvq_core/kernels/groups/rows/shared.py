"""What the groups of a program share: sizes, buffers, barriers."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.groups.line import KEYS

ROWS = gl.constexpr(64)  # query heads of a program
HALF = gl.constexpr(256)  # columns of the latent of one consumer
ROPE = gl.constexpr(64)


class Buffers(NamedTuple):
    """Shared memory. A stage holds a tile of one consumer, which both read."""

    q: Any  # the lower half of the latent, the upper, the rope part: each [1, ROWS, columns]
    latent: Any  # the lower half, the upper: each [stage, KEYS, HALF]
    rope: Any  # [stage, KEYS, ROPE]
    p: Any  # [ROWS, KEYS] probabilities: who writes them has read the other consumer's before
    # [2 * consumer + i, ROWS] float32: i 0, maximum of the rows, at last the other's sums; i 1, what scales older ones
    stats: Any


class Barriers(NamedTuple):
    """Each is waited for with the parity of how often it was completed before."""

    ready: Any  # 2 * stage + half of the latent; 4 + stage: the rope part
    empty: Any  # 2 * stage + half
    published: Any  # by consumer: probabilities and statistics of a tile
    queries: Any  # 0: stored, 1: not needed any more
    finished: Any  # all tiles of a segment, by both consumers


@gluon.jit
def make_buffers():
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = (
        gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(gl.bfloat16, [1, ROWS, ROPE], SHARED),
    )
    latent = (
        gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, HALF], SHARED),
        gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, HALF], SHARED),
    )
    rope = gl.allocate_shared_memory(gl.bfloat16, [2, KEYS, ROPE], SHARED)
    p = gl.allocate_shared_memory(gl.bfloat16, [ROWS, KEYS], SHARED)
    stats = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)
    return Buffers(q, latent, rope, p, stats)


@gluon.jit
def make_barriers():
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    barriers = Barriers(
        gl.allocate_shared_memory(gl.int64, [6, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [4, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [1], LAYOUT),
    )
    for i in gl.static_range(6):
        mbarrier.init(barriers.ready.index(i), count=128)  # every thread of the producer reports its copies
    for i in gl.static_range(4):
        mbarrier.init(barriers.empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(barriers.published.index(i), count=1)
        mbarrier.init(barriers.queries.index(i), count=1 + i)
    mbarrier.init(barriers.finished, count=2)
    fence_async_shared()
    return barriers
