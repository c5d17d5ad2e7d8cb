"""What the groups of a program share: sizes, buffers, barriers, and the way along the line of tiles."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.segments import keys_of, queries_of

ROWS = gl.constexpr(64)  # query heads of a program
KEYS = gl.constexpr(64)  # of a tile; S.tile is two of them, one for each consumer
HALF = gl.constexpr(256)  # columns of the latent of one consumer
ROPE = gl.constexpr(64)
LAZY = gl.constexpr(8)  # a maximum is raised once a score is 2^LAZY times as probable: older sums are rarely scaled
FACTOR = gl.constexpr(3)  # of the statistics: until consumer 1 publishes, what turns dots into scores


class Buffers(NamedTuple):
    """Shared memory. A stage holds a tile of one consumer, which both read."""

    q: Any  # the lower half of the latent, the upper, the rope part: each [1, ROWS, columns]
    latent: Any  # the lower half, the upper: each [stage, KEYS, HALF]
    rope: Any  # [stage, KEYS, ROPE]
    p: Any  # [ROWS, KEYS] probabilities: who writes them has read the other consumer's before
    # [2 * consumer + i, ROWS] float32: i 0, maximum of the rows, at last the other's sums; i 1, what scales older ones
    stats: Any
    scales: Any  # [3 * stage + i, KEYS] float32, per-token-head modes: row scales, their log2, their inverse


class Barriers(NamedTuple):
    """Each is waited for with the parity of how often it was completed before."""

    ready: Any  # 2 * stage + half of the latent; 4 + stage: the rope part
    empty: Any  # 2 * stage + half
    published: Any  # by consumer: probabilities and statistics of a tile
    queries: Any  # 0: stored, 1: not needed any more
    finished: Any  # all tiles of a segment, by both consumers


class Lengths(NamedTuple):
    """Keys and queries of all sequences."""

    seq_lens_ptr: Any
    cu_seqlens_q_ptr: Any
    num_seqs: Any
    capacity: Any  # keys that a row of the page table has room for
    num_q_tokens: Any


class Line(NamedTuple):
    """A part of the line of `kvq_core.kernels.segments`."""

    seq: Any
    first_tile: Any  # of ``seq``
    tile: Any
    last_tile: Any  # of the part, exclusive
    lengths: Any


@gluon.jit
def make_buffers(S: gl.constexpr):
    OPERAND: gl.constexpr = gl.float16 if S.v_operand == "float16" else gl.bfloat16
    ROPE_OPERAND: gl.constexpr = gl.float16 if S.k_operand == "float16" else gl.bfloat16
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = (
        gl.allocate_shared_memory(OPERAND, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(OPERAND, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(ROPE_OPERAND, [1, ROWS, ROPE], SHARED),
    )
    latent = (
        gl.allocate_shared_memory(OPERAND, [2, KEYS, HALF], SHARED),
        gl.allocate_shared_memory(OPERAND, [2, KEYS, HALF], SHARED),
    )
    rope = gl.allocate_shared_memory(ROPE_OPERAND, [2, KEYS, ROPE], SHARED)
    p = gl.allocate_shared_memory(OPERAND, [ROWS, KEYS], SHARED)
    stats = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)
    scales = stats  # anything: it is read only where there are row scales
    if S.records.v.per_token_head:
        scales = gl.allocate_shared_memory(gl.float32, [6, KEYS], VECTOR)
    return Buffers(q, latent, rope, p, stats, scales)


@gluon.jit
def make_barriers(S: gl.constexpr):
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    barriers = Barriers(
        gl.allocate_shared_memory(gl.int64, [6, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [4, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        gl.allocate_shared_memory(gl.int64, [1], LAYOUT),
    )
    COPIES: gl.constexpr = 128  # every thread of the producer reports its asynchronous copies
    for i in gl.static_range(4):
        mbarrier.init(barriers.ready.index(i), count=1 if S.records.v.code_bytes == 1 else COPIES)
        mbarrier.init(barriers.empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(barriers.ready.index(4 + i), count=1 if S.records.k.code_bytes == 1 else COPIES)
        mbarrier.init(barriers.published.index(i), count=1)
        mbarrier.init(barriers.queries.index(i), count=1 + i)
    mbarrier.init(barriers.finished, count=2)
    fence_async_shared()
    return barriers


@gluon.jit
def keys_of_sequences(seq, lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.keys_of`."""
    exists = seq < lengths.num_seqs
    return keys_of(seq, exists, lengths.seq_lens_ptr, lengths.cu_seqlens_q_ptr, lengths.capacity, S)


@gluon.jit
def keys_of_segment(line, S: gl.constexpr):
    """The keys of the part that are of the sequence at hand: first, end, and the end of the sequence's."""
    _, seq_end = keys_of_sequences(line.seq, line.lengths, S)
    start = ((line.tile - line.first_tile) * S.tile).to(gl.int32)
    end = gl.minimum((line.last_tile - line.first_tile) * S.tile, seq_end.to(gl.int64)).to(gl.int32)
    return start, end, seq_end


@gluon.jit
def next_segment(line, seq_end, S: gl.constexpr):
    """The line from the first tile of the next sequence."""
    tile = line.first_tile + gl.cdiv(seq_end, S.tile)
    return Line(line.seq + 1, tile, tile, line.last_tile, line.lengths)


@gluon.jit
def rows_of_query(line, row, S: gl.constexpr):
    """Token of the query of the sequence at hand, and which heads of it exist."""
    lengths = line.lengths
    token, num_queries = queries_of(line.seq, line.seq < lengths.num_seqs, lengths.cu_seqlens_q_ptr, S)
    exists = (num_queries > 0) & (token >= 0) & (token < lengths.num_q_tokens)
    return token, (row < S.group) & exists
