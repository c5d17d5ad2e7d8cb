"""What the groups of a program share: sizes, layouts, buffers, barriers."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kvq_core.kernels.groups.line import KEYS

RANK = gl.constexpr(512)
ROPE = gl.constexpr(64)
CHUNK = gl.constexpr(64)  # columns of a latent that are decoded at once
CHUNKS = gl.constexpr(RANK.value // CHUNK.value)

# As words of 32 bits, in pieces of 16 bytes. Piece p of row r lies at place p ^ r % 8: threads that read the same piece
# of neighbouring rows, or copy a row, meet no bank twice. Rows of 64 bytes need no exchange.
CODES = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 8, [1, 0]))
ROPE_CODES = gl.constexpr(gl.SwizzledSharedLayout(4, 1, 1, [1, 0]))


@gluon.constexpr_function
def shares_columns(S):
    """Whether consumers share out the columns of the output, as the sums of all do not fit into registers of one.

    Else each has sums of its own, over every second tile. The plan says which, by the keys of a step.
    """
    return S.tile == 2 * KEYS


@gluon.constexpr_function
def stages_of(S):
    """Tiles that fit into shared memory beside the queries, each with room for its probabilities."""
    return 3 if S.rows >= 64 else 4


@gluon.constexpr_function
def parts_of(S):
    """Parts of the keys of a tile, which are added, freed and filled one by one where stages are few."""
    return 2 if stages_of(S) < 4 else 1


@gluon.constexpr_function
def dot_layout(S):
    """Of scores [KEYS, heads] and sums [CHUNK, heads]."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, S.rows, 16])


class Buffers(NamedTuple):
    """Shared memory. ``heads`` are S.rows."""

    q: Any  # [1, heads, RANK] in the order of columns of `codec.K_VIEW`
    q_rope: Any  # [1, heads, ROPE], as `codec.ROPE_VIEW` if rope parts are codes
    factor: Any  # float32 [heads], what turns dots into scores in units of log2
    codes: Any  # int32 [stage, KEYS, RANK / 4]
    rope: Any  # int32 [stage, KEYS, ROPE * code_bytes / 4]
    scales: Any  # float32 [stage, KEYS], per-token-head modes
    p: Any  # float16 [stage, KEYS, heads] probabilities
    maxima: Any  # float32 [heads] less S.p_shift, of consumers that share out columns
    alphas: Any  # by consumer: float32 [heads], what its tile scales older sums by, if it raised a maximum
    raised: Any  # by consumer: int32 [1], whether it did
    totals: Any  # [2 * consumer + i, heads] float32 at the end of a segment: i 0, maxima, i 1, sums of probabilities
    sums: Any  # float32 [CHUNKS, CHUNK, heads] at the end of a segment, of consumers with sums of their own


class Barriers(NamedTuple):
    """Each is waited for with the parity of how often it was completed before."""

    ready: Any  # by stage: a tile is here, and there is room for its probabilities
    empty: Any  # by stage and part: nobody needs its codes; the last part's, nor anything else of the tile
    published: Any  # by consumer: probabilities of a tile
    queries: Any  # 0: stored, 1: not needed any more
    finished: Any  # by both consumers: 0, all tiles of a segment, 1, sums for the other


@gluon.jit
def make_buffers(S: gl.constexpr):
    HEADS: gl.constexpr = S.rows
    STAGES: gl.constexpr = stages_of(S)
    OPERAND: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    P: gl.constexpr = gl.NVMMASharedLayout(min(128, 2 * S.rows), 16)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    ROPE_TYPE: gl.constexpr = gl.float16 if S.k_operand == "float16" else gl.bfloat16
    ROPE_LAYOUT: gl.constexpr = ROPE_CODES if S.records.k.code_bytes == 1 else CODES
    ROPE_WORDS: gl.constexpr = ROPE * S.records.k.code_bytes // 4
    totals = gl.allocate_shared_memory(gl.float32, [4, HEADS], VECTOR)
    scales = totals  # anything: it is read only where there are row scales
    if S.records.v.per_token_head:
        scales = gl.allocate_shared_memory(gl.float32, [STAGES, KEYS], VECTOR)
    sums = totals  # likewise
    if not shares_columns(S):
        sums = gl.allocate_shared_memory(gl.float32, [CHUNKS, CHUNK, HEADS], ROWS)
    return Buffers(
        q=gl.allocate_shared_memory(gl.float16, [1, HEADS, RANK], OPERAND),
        q_rope=gl.allocate_shared_memory(ROPE_TYPE, [1, HEADS, ROPE], OPERAND),
        factor=gl.allocate_shared_memory(gl.float32, [HEADS], VECTOR),
        codes=gl.allocate_shared_memory(gl.int32, [STAGES, KEYS, RANK // 4], CODES),
        rope=gl.allocate_shared_memory(gl.int32, [STAGES, KEYS, ROPE_WORDS], ROPE_LAYOUT),
        scales=scales,
        p=gl.allocate_shared_memory(gl.float16, [STAGES, KEYS, HEADS], P),
        maxima=gl.allocate_shared_memory(gl.float32, [HEADS], VECTOR),
        alphas=gl.allocate_shared_memory(gl.float32, [2, HEADS], VECTOR),
        raised=gl.allocate_shared_memory(gl.int32, [2, 1], VECTOR),
        totals=totals,
        sums=sums,
    )


@gluon.jit
def make_barriers(S: gl.constexpr):
    STAGES: gl.constexpr = stages_of(S)
    READERS: gl.constexpr = 2 if shares_columns(S) else 1  # of the values of a tile
    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    barriers = Barriers(
        ready=gl.allocate_shared_memory(gl.int64, [STAGES, 1], LAYOUT),
        empty=gl.allocate_shared_memory(gl.int64, [STAGES * parts_of(S), 1], LAYOUT),
        published=gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        queries=gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
        finished=gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT),
    )
    for i in gl.static_range(STAGES):
        mbarrier.init(barriers.ready.index(i), count=128)  # every thread of the producer reports its copies
    for i in gl.static_range(STAGES * parts_of(S)):
        mbarrier.init(barriers.empty.index(i), count=READERS)
    for i in gl.static_range(2):
        mbarrier.init(barriers.published.index(i), count=1)
        mbarrier.init(barriers.queries.index(i), count=1 + i)
        mbarrier.init(barriers.finished.index(i), count=2)
    fence_async_shared()
    return barriers
