"""Decoding MLA with many heads on Hopper, where groups of four warps have tasks of their own.

Triton proper gives all warps the same task, so tensor cores wait while codes are decoded and exponentials taken. In
Gluon, Triton's lower level, a program here is

- a producer, which brings tiles of 64 keys into shared memory, 8-bit codes decoded to 16 bits;
- two consumers. Consumer 0 takes the even tiles: scores, softmax, probabilities; consumer 1 the odd ones. Each adds up
  its half of the output's columns, over all tiles in their order: its own tile with probabilities from registers, the
  other's with those that the other published in shared memory, next to the maximum of the rows so far and what that
  scales older sums by.

While one consumer is at its exponentials, the other keeps the tensor cores busy. A stage of shared memory belongs to
the tiles of one consumer. Its halves, the columns below 256 and those above, are filled and freed one by one: consumer
0 is the last that reads the lower half, consumer 1 the upper. That two groups share out the columns and alternate tiles
is the "seesaw" schedule of FlashMLA.

Arithmetic, masks and segments are those of `kvq_core.kernels.latent` and `kvq_core.kernels.mla`.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kvq_core.kernels.attend import LOG2E, MIN_SCALE
from kvq_core.kernels.decode import partial_lse
from kvq_core.kernels.segments import keys_of, part_start, queries_of

ROWS = gl.constexpr(64)  # query heads of a program
KEYS = gl.constexpr(64)  # of a tile; S.tile is two of them, one for each consumer
HALF = gl.constexpr(256)  # columns of the latent of one consumer
ROPE = gl.constexpr(64)
CHUNKS = gl.constexpr(8)  # of the codes of a tile, each decoded at once
DEPTH = gl.constexpr(4)  # chunks that are loaded ahead
SEQS = gl.constexpr(128)  # sequences looked at in a step
TWO_NANS = gl.constexpr(0x7FC07FC0)  # in bfloat16 and in float16

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
SCORE_KEYS = gl.constexpr(gl.SliceLayout(0, SCORES.value))


@gluon.jit(do_not_specialize=["num_q_tokens", "num_seqs", "num_pages", "max_pages", "q_stride_token", "q_stride_head"])
def attend_mla_groups(
    q_ptr,  # [num_q_tokens, num_heads, 576] bfloat16 or float16
    pages_ptr,  # uint8 [num_pages, 1, record_bytes]
    k_scale_ptr,  # float32 [], per-tensor modes
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    cu_seqlens_q_ptr,  # int32 [num_seqs + 1] if S.has_cu_seqlens
    num_q_tokens,
    num_seqs,
    num_pages,
    max_pages,
    q_stride_token,  # elements / S.q_align
    q_stride_head,
    partial_ptr,  # out float32 [num_segments, 1, S.part_stride]: see decode.partial_lse
    S: gl.constexpr,
):
    """One part of the keys of all sequences, for 64 heads of their one query. Launch with four warps: eight join."""
    pid = gl.program_id(0)
    block = pid % S.row_blocks
    program = (pid // S.row_blocks).to(gl.int64)
    capacity = max_pages * S.records.page_size
    if S.overlap:
        tl.extra.cuda.gdc_launch_dependents()
    lengths = (seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity)
    total = _total_tiles(lengths, S)
    tile = part_start(program, total, S)
    last_tile = part_start(program + 1, total, S)
    seq, first_tile = _find_sequence(tile, lengths, S)

    IS_CODED: gl.constexpr = S.records.v.code_bytes == 1
    OPERAND: gl.constexpr = gl.float16 if IS_CODED else gl.bfloat16
    ROPE_OPERAND: gl.constexpr = gl.float16 if S.k_operand == "float16" else gl.bfloat16
    SHARED: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    VECTOR: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_bufs = (
        gl.allocate_shared_memory(OPERAND, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(OPERAND, [1, ROWS, HALF], SHARED),
        gl.allocate_shared_memory(ROPE_OPERAND, [1, ROWS, ROPE], SHARED),
    )
    k_bufs = (
        gl.allocate_shared_memory(OPERAND, [2, KEYS, HALF], SHARED),
        gl.allocate_shared_memory(OPERAND, [2, KEYS, HALF], SHARED),
    )
    rope_bufs = gl.allocate_shared_memory(ROPE_OPERAND, [2, KEYS, ROPE], SHARED)
    p_buf = gl.allocate_shared_memory(OPERAND, [ROWS, KEYS], SHARED)
    stats = gl.allocate_shared_memory(gl.float32, [4, ROWS], VECTOR)  # of each consumer: maximum, what scales old sums
    scale_bufs = stats
    if S.records.v.per_token_head:
        scale_bufs = gl.allocate_shared_memory(gl.float32, [6, KEYS], VECTOR)  # of a stage: scale, log2, inverse
    bufs = (q_bufs, k_bufs, rope_bufs, p_buf, stats, scale_bufs)

    LAYOUT: gl.constexpr = mbarrier.MBarrierLayout()
    ready = gl.allocate_shared_memory(gl.int64, [6, 1], LAYOUT)  # 2 * stage + half, 4 + stage: the rope part
    empty = gl.allocate_shared_memory(gl.int64, [4, 1], LAYOUT)  # 2 * stage + half
    published = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)  # of a consumer
    q_state = gl.allocate_shared_memory(gl.int64, [2, 1], LAYOUT)  # ready, empty
    finished = gl.allocate_shared_memory(gl.int64, [1], LAYOUT)  # all tiles of a segment, by both consumers
    COPIES: gl.constexpr = 128  # every thread of the producer reports its asynchronous copies
    for i in gl.static_range(4):
        mbarrier.init(ready.index(i), count=1 if IS_CODED else COPIES)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(4 + i), count=1 if S.records.k.code_bytes == 1 else COPIES)
        mbarrier.init(published.index(i), count=1)
        mbarrier.init(q_state.index(i), count=1 + i)
    mbarrier.init(finished, count=2)
    fence_async_shared()
    barriers = (ready, empty, published, q_state, finished)

    walk = (seq, tile, first_tile, last_tile, lengths, num_q_tokens)
    queries = (q_ptr, q_stride_token, q_stride_head, block, k_scale_ptr)
    pool = (pages_ptr, page_table_ptr, num_pages, max_pages)
    result = (partial_ptr, program, block, k_scale_ptr)
    REGISTERS: gl.constexpr = 208 if IS_CODED else 224  # of the 512 that the threads of three groups share
    gl.warp_specialize(
        [
            (_produce, (bufs, barriers, walk, queries, pool, S)),
            (_consume, (bufs, barriers, walk, result, 0, S)),
            (_consume, (bufs, barriers, walk, result, 1, S)),
        ],
        [4, 4],
        [REGISTERS, REGISTERS],
    )


@gluon.jit
def _tiles_of_sequences(first_seq, lengths, S: gl.constexpr):
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity = lengths
    seq = first_seq + gl.arange(0, SEQS, layout=gl.BlockedLayout([1], [32], [4], [0]))
    start, end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
    return gl.cdiv(end - start, S.tile).to(gl.int64)


@gluon.jit
def _total_tiles(lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.total_tiles`."""
    _, _, num_seqs, _ = lengths
    total = (num_seqs * 0).to(gl.int64)
    for first_seq in range(0, num_seqs, SEQS):
        total += gl.sum(_tiles_of_sequences(first_seq, lengths, S), 0)
    return total


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def _find_sequence(tile, lengths, S: gl.constexpr):
    """`kvq_core.kernels.segments.find_sequence`."""
    _, _, num_seqs, _ = lengths
    line = tile * 0
    seq = num_seqs * 0
    first_tile = tile * 0
    for first_seq in range(0, num_seqs, SEQS):
        tiles = _tiles_of_sequences(first_seq, lengths, S)
        before = line + gl.associative_scan(tiles, 0, _add) <= tile
        seq += gl.sum(before.to(gl.int32), 0)
        first_tile += gl.sum(gl.where(before, tiles, 0), 0)
        line += gl.sum(tiles, 0)
    return seq, first_tile


@gluon.jit
def _keys_of_segment(seq, tile, first_tile, last_tile, lengths, S: gl.constexpr):
    """The keys of the part that are of sequence ``seq``: first, end, and the end of the sequence's."""
    seq_lens_ptr, cu_seqlens_q_ptr, num_seqs, capacity = lengths
    _, seq_end = keys_of(seq, seq < num_seqs, seq_lens_ptr, cu_seqlens_q_ptr, capacity, S)
    start = ((tile - first_tile) * S.tile).to(gl.int32)
    end = gl.minimum((last_tile - first_tile) * S.tile, seq_end.to(gl.int64)).to(gl.int32)
    return start, end, seq_end


@gluon.jit
def _row_is_valid(seq, row, lengths, num_q_tokens, S: gl.constexpr):
    """Token of the query of sequence ``seq``, and which heads of it exist."""
    _, cu_seqlens_q_ptr, num_seqs, _ = lengths
    token, num_queries = queries_of(seq, seq < num_seqs, cu_seqlens_q_ptr, S)
    exists = (num_queries > 0) & (token >= 0) & (token < num_q_tokens)
    return token, (row < S.group) & exists


# ------------------------------------------------------------------------------------------------------------ consumers


@gluon.jit
def _consume(bufs, barriers, walk, result, W: gl.constexpr, S: gl.constexpr):
    """Consumer ``W``: scores of the tiles of stage W, and columns W * HALF.. of the output."""
    _, _, _, _, stats, _ = bufs
    _, _, _, q_state, finished = barriers
    seq, tile, first_tile, last_tile, lengths, num_q_tokens = walk
    pairs_done = tile.to(gl.int32) * 0
    segments_done = pairs_done
    while tile < last_tile:
        start, end, seq_end = _keys_of_segment(seq, tile, first_tile, last_tile, lengths, S)
        if start < end:
            mbarrier.wait(q_state.index(0), segments_done & 1)
            factor = stats.index(3).load(SCORE_ROWS)
            pairs = gl.cdiv(end - start, S.tile)
            acc = gl.zeros([ROWS, HALF], gl.float32, SUMS)
            m = gl.full([ROWS], float("-inf"), gl.float32, SCORE_ROWS)
            l = gl.zeros([ROWS], gl.float32, SCORE_ROWS)
            for i in range(pairs):
                turn = pairs_done + i
                left = end - (start + i * S.tile + W * KEYS)
                if W == 1:
                    acc, m, l = _add_others(acc, l, bufs, barriers, turn, W, S)
                s = _scores(bufs, barriers, turn, W, S)
                p, alpha, m = _softmax(s, m, factor, left, bufs, W, S)
                _publish(p, m, alpha, bufs, barriers, W)
                acc = _add_own(acc, p, alpha, bufs, barriers, W)
                l = l * alpha + _sum_rows(p, bufs, W, S)
                if W == 0:
                    acc, m, l = _add_others(acc, l, bufs, barriers, turn, W, S)
            # Each has summed up its own tiles. Nobody reads the first two statistics of this segment any more.
            stats.index(W).store(l)
            mbarrier.arrive(finished, count=1)
            mbarrier.wait(finished, segments_done & 1)
            l += stats.index(1 - W).load(SCORE_ROWS)
            mbarrier.arrive(q_state.index(1), count=1)
            _store_part(acc, m, l, result, seq, lengths, num_q_tokens, W, S)
            pairs_done += pairs
            segments_done += 1
        first_tile += gl.cdiv(seq_end, S.tile)
        tile = first_tile
        seq += 1


@gluon.jit
def _scores(bufs, barriers, turn, W: gl.constexpr, S: gl.constexpr):
    """The dots [ROWS, KEYS] of q with the keys of stage W, those of the latent times its row scales.

    Every step of a dot truncates its sums. Where nothing else rounds as much, two sums take half of the steps each.
    """
    IS_CODED: gl.constexpr = S.records.v.code_bytes == 1
    q_bufs, k_bufs, rope_bufs, _, _, scale_bufs = bufs
    ready, _, _, _, _ = barriers
    phase = turn & 1
    zero = turn >> 30  # always, but the compiler does not know, and keeps no descriptors in registers
    s = gl.zeros([ROWS, KEYS], gl.float32, SCORES)
    upper = s
    for half in gl.static_range(2):
        mbarrier.wait(ready.index(2 * W + half), phase)
        if not IS_CODED:
            fence_async_shared()  # asynchronous copies: tensor cores see memory through another proxy
        k = k_bufs[half].index(W + zero).permute((1, 0))
        if half == 1 and not IS_CODED:
            upper = warpgroup_mma(q_bufs[half].index(zero), k, upper, use_acc=False, is_async=True)
        else:
            s = warpgroup_mma(q_bufs[half].index(zero), k, s, use_acc=half == 1, is_async=True)
    if S.records.v.per_token_head:
        s = warpgroup_mma_wait(0, deps=[s])
        s = s * scale_bufs.index(3 * W).load(SCORE_KEYS)[None, :]
    mbarrier.wait(ready.index(4 + W), phase)
    if S.records.k.code_bytes != 1:
        fence_async_shared()
    s = warpgroup_mma(q_bufs[2].index(zero), rope_bufs.index(W + zero).permute((1, 0)), s, is_async=True)
    if IS_CODED:
        s = warpgroup_mma_wait(0, deps=[s])
    else:
        s, upper = warpgroup_mma_wait(0, deps=[s, upper])
        s = s + upper
    return s


@gluon.jit
def _softmax(s, m, factor, left, bufs, W: gl.constexpr, S: gl.constexpr):
    """One step of the online softmax over a tile of which ``left`` keys exist.

    Returns probabilities (times their row scales), what scales the old sums, and the new maximum.
    """
    _, _, _, _, _, scale_bufs = bufs
    x = s * factor[:, None]
    if S.records.v.per_token_head:
        x = x + scale_bufs.index(3 * W + 1).load(SCORE_KEYS)[None, :]
    if left < KEYS:
        x = gl.where((gl.arange(0, KEYS, layout=SCORE_KEYS) < left)[None, :], x, float("-inf"))
    m_new = gl.maximum(m, gl.max(x, 1))
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    return gl.exp2(x - (m_safe - S.p_shift)[:, None]), gl.exp2(m - m_safe), m_new


@gluon.jit
def _sum_rows(p, bufs, W: gl.constexpr, S: gl.constexpr):
    _, _, _, _, _, scale_bufs = bufs
    if S.records.v.per_token_head:
        p = p * scale_bufs.index(3 * W + 2).load(SCORE_KEYS)[None, :]
    return gl.sum(p, 1)


@gluon.jit
def _publish(p, m, alpha, bufs, barriers, W: gl.constexpr):
    _, _, _, p_buf, stats, _ = bufs
    _, _, published, _, _ = barriers
    p_buf.store(p.to(p_buf.dtype))  # who writes probabilities has read the other's before
    stats.index(2 * W).store(m)
    stats.index(2 * W + 1).store(alpha)
    fence_async_shared()
    mbarrier.arrive(published.index(W), count=1)


@gluon.jit
def _add_own(acc, p, alpha, bufs, barriers, W: gl.constexpr):
    """Add one's own tile, and free the half of its stage that belongs to these columns."""
    _, k_bufs, _, _, _, _ = bufs
    _, empty, _, _, _ = barriers
    acc = _scale_rows(acc, alpha)
    operand = gl.convert_layout(p.to(k_bufs[0].dtype), gl.DotOperandLayout(0, SUMS, 2), assert_trivial=True)
    acc = warpgroup_mma(operand, k_bufs[W].index(W), acc, is_async=True)
    acc, operand = warpgroup_mma_wait(0, deps=[acc, operand])
    mbarrier.arrive(empty.index(3 * W), count=1)
    return acc


@gluon.jit
def _add_others(acc, l, bufs, barriers, turn, W: gl.constexpr, S: gl.constexpr):
    """Add the other consumer's tile: the new sums, the maximum of the rows up to it, and one's own sums of rows."""
    _, k_bufs, _, p_buf, stats, _ = bufs
    ready, empty, published, _, _ = barriers
    OTHER: gl.constexpr = 1 - W
    phase = turn & 1
    mbarrier.wait(published.index(OTHER), phase)
    if S.records.v.code_bytes != 1:
        mbarrier.wait(ready.index(2 * OTHER + W), phase)  # complete already: copies must be visible here too
        fence_async_shared()
    m = stats.index(2 * OTHER).load(SCORE_ROWS)
    alpha = stats.index(2 * OTHER + 1).load(SCORE_ROWS)
    acc = _scale_rows(acc, alpha)
    acc = warpgroup_mma(p_buf, k_bufs[W].index(OTHER), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(2 * OTHER + W), count=1)
    return acc, m, l * alpha


@gluon.jit
def _scale_rows(acc, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, SUMS), assert_trivial=True)[:, None]


@gluon.jit
def _store_part(acc, m, l, result, seq, lengths, num_q_tokens, W: gl.constexpr, S: gl.constexpr):
    partial_ptr, program, block, k_scale_ptr = result
    part_ptr = partial_ptr + (program + seq) * S.part_stride
    factor = gl.where(l == 0.0, 0.0, 1.0 / l)
    if S.records.v.per_tensor:
        factor *= gl.load(k_scale_ptr)
    out = _scale_rows(acc, factor)
    row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, SUMS))
    column = W * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(0, SUMS))
    _, valid = _row_is_valid(seq, row, lengths, num_q_tokens, S)
    gl.store(part_ptr + row[:, None] * (2 * HALF) + column[None, :], out, mask=valid[:, None])
    if W == 0:
        lse = gl.where(l == 0.0, float("-inf"), m + gl.log2(l) - S.p_shift)
        row = block * ROWS + gl.arange(0, ROWS, layout=SCORE_ROWS)
        _, valid = _row_is_valid(seq, row, lengths, num_q_tokens, S)
        gl.store(partial_lse(part_ptr, S) + row, lse, mask=valid)


# ------------------------------------------------------------------------------------------------------------- producer


@gluon.jit
def _produce(bufs, barriers, walk, queries, pool, S: gl.constexpr):
    pages_ptr, page_table_ptr, num_pages, max_pages = pool
    seq, tile, first_tile, last_tile, lengths, num_q_tokens = walk
    pairs_done = tile.to(gl.int32) * 0
    segments_done = pairs_done
    while tile < last_tile:
        start, end, seq_end = _keys_of_segment(seq, tile, first_tile, last_tile, lengths, S)
        if start < end:
            _store_queries(bufs, barriers, queries, seq, lengths, num_q_tokens, segments_done & 1, S)
            pairs = gl.cdiv(end - start, S.tile)
            table = (pages_ptr, page_table_ptr + seq.to(gl.int64) * max_pages, num_pages, max_pages)
            if S.records.v.code_bytes == 1:
                _decode_tiles(bufs, barriers, table, start, end, pairs, pairs_done, S)
            else:
                _copy_tiles(bufs, barriers, table, start, end, pairs, pairs_done, S)
            pairs_done += pairs
            segments_done += 1
        first_tile += gl.cdiv(seq_end, S.tile)
        tile = first_tile
        seq += 1
    if S.records.k.code_bytes != 1:
        async_copy.wait_group(0)


@gluon.jit
def _load_page_id(table, first, S: gl.constexpr):
    """The page of the tile from ``first``, as the table says."""
    _, table_ptr, _, max_pages = table
    column = gl.minimum(first // S.records.page_size, max_pages - 1)
    return gl.load(table_ptr + column)


@gluon.jit
def _find_tile(page, table, first, S: gl.constexpr):
    """Offset in bytes of the record of ``page``, tokens from its first to the tile, and whether the page exists."""
    _, _, num_pages, _ = table
    ALIGN: gl.constexpr = S.records.align
    exists = (page >= 0) & (page < num_pages)
    record = gl.where(exists, page, 0).to(gl.int64) * S.records.page_stride
    return gl.multiple_of(record, ALIGN), first % S.records.page_size, exists


@gluon.jit
def _load_query_columns(q_rows, row_mask, FIRST: gl.constexpr):
    """Columns FIRST to FIRST + 64 of the queries."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    column = FIRST + gl.arange(0, 64, layout=gl.SliceLayout(0, L))
    return gl.load(q_rows[:, None] + column[None, :], mask=row_mask[:, None], other=0.0)


@gluon.jit
def _store_queries(bufs, barriers, queries, seq, lengths, num_q_tokens, phase, S: gl.constexpr):
    """Rows of q as operands, and what turns their dots into scores in units of log2."""
    q_bufs, _, _, _, stats, _ = bufs
    _, _, _, q_state, _ = barriers
    q_ptr, q_stride_token, q_stride_head, block, k_scale_ptr = queries
    L: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = block * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    token, valid = _row_is_valid(seq, row, lengths, num_q_tokens, S)
    q_rows = q_ptr + token.to(gl.int64) * (q_stride_token.to(gl.int64) * S.q_align)
    q_rows = q_rows + row.to(gl.int64) * (q_stride_head.to(gl.int64) * S.q_align)
    factor = gl.full([ROWS], S.sm_scale * LOG2E, gl.float32, gl.SliceLayout(1, L))
    if S.normalize_q:  # the rope part shares the power of two, but must not overflow
        largest = gl.full([ROWS], 0, gl.int32, gl.SliceLayout(1, L))
        for i in gl.static_range(8):
            largest = gl.maximum(largest, _largest_bits(_load_query_columns(q_rows, valid, 64 * i)))
        rope_largest = _largest_bits(_load_query_columns(q_rows, valid, 2 * HALF))
        if S.k_operand == "float16":
            largest = gl.maximum(largest, rope_largest)
        else:
            largest = gl.maximum(largest, gl.minimum(rope_largest, 0x7F000000) - (100 << 23))
        exponent = gl.minimum(gl.maximum(largest >> 23, 15), 253)
        inverse = ((268 - exponent) << 23).to(gl.float32, bitcast=True)
        factor = factor * ((exponent - 14) << 23).to(gl.float32, bitcast=True)
    if S.records.v.per_tensor:
        factor = factor * gl.load(k_scale_ptr)
    mbarrier.wait(q_state.index(1), phase ^ 1)
    for i in gl.static_range(9):
        x = _load_query_columns(q_rows, valid, 64 * i)
        if S.normalize_q:
            x = x.to(gl.float32) * inverse[:, None]
        if i < 8:
            q_bufs[i // 4].index(0).slice(i % 4 * 64, 64, 1).store(x.to(q_bufs[0].dtype))
        else:
            q_bufs[2].index(0).store(x.to(q_bufs[2].dtype))
    stats.index(3).store(factor)  # consumer 1 has not published anything of this segment
    fence_async_shared()
    mbarrier.arrive(q_state.index(0), count=1)


@gluon.jit
def _largest_bits(x):
    """The bits of the largest magnitude of each row, in float32."""
    return gl.max(x.to(gl.float32).to(gl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@gluon.jit
def _copy_rope(rope_bufs, ready, table, record, offset, in_pool, W: gl.constexpr, S: gl.constexpr):
    """Start copying rope rows in bfloat16. Those of a page that does not exist are NaN."""
    SIDE: gl.constexpr = S.records.k
    L: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, ROPE // 2, layout=gl.SliceLayout(0, L))
    words = rope_bufs._reinterpret(gl.int32, [2, KEYS, ROPE // 2], gl.NVMMASharedLayout(128, 32)).index(W)
    first = (record + (SIDE.codes + offset * SIDE.slot_stride)) // 4
    base = table[0].to(gl.pointer_type(gl.int32), bitcast=True) + gl.multiple_of(first, 4)
    ptrs = base + (row[:, None] * (SIDE.slot_stride // 4) + column[None, :])
    async_copy.async_copy_global_to_shared(words, ptrs, mask=in_pool)
    if not in_pool:
        async_copy.commit_group()
        async_copy.wait_group(0)
        words.store(gl.full([KEYS, ROPE // 2], TWO_NANS, gl.int32, L))
    async_copy.mbarrier_arrive(ready.index(4 + W), increment_count=False)


@gluon.jit
def _copy_tiles(bufs, barriers, table, start, end, pairs, pairs_done, S: gl.constexpr):
    """bfloat16: asynchronous copies, 16 bytes a thread."""
    _, k_bufs, rope_bufs, _, _, _ = bufs
    ready, empty, _, _, _ = barriers
    SIDE: gl.constexpr = S.records.v
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, L))
    offsets = row[:, None] * (SIDE.slot_stride // 2) + column[None, :]
    next_page = _load_page_id(table, start, S)
    for i in range(pairs):
        phase = (pairs_done + i) & 1
        for W in gl.static_range(2):
            first = start + i * S.tile + W * KEYS
            page = next_page
            next_page = _load_page_id(table, first + KEYS, S)
            record, offset, in_pool = _find_tile(page, table, first, S)
            left = end - first
            base = gl.multiple_of((record + (SIDE.codes + offset * SIDE.slot_stride)) // 2, 8)
            ptrs = table[0].to(gl.pointer_type(gl.bfloat16), bitcast=True) + base + offsets
            for half in gl.static_range(2):
                mbarrier.wait(empty.index(2 * W + half), phase ^ 1)
                async_copy.async_copy_global_to_shared(
                    k_bufs[half].index(W), ptrs + half * HALF, mask=(row < left)[:, None]
                )
                async_copy.mbarrier_arrive(ready.index(2 * W + half), increment_count=False)
            _copy_rope(rope_bufs, ready, table, record, offset, in_pool, W, S)


@gluon.jit
def _load_codes(pages_ptr, record, offset, CHUNK: gl.constexpr, S: gl.constexpr):
    """Codes of some rows of one half of the columns, as words of four: [rows, 64]."""
    SIDE: gl.constexpr = S.records.v
    PER_HALF: gl.constexpr = CHUNKS // 2
    COUNT: gl.constexpr = KEYS // PER_HALF
    L: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, COUNT, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, HALF // 4, layout=gl.SliceLayout(0, L))
    base = gl.multiple_of((record + (SIDE.codes + offset * SIDE.slot_stride)) // 4, 4)
    FIRST: gl.constexpr = CHUNK % PER_HALF * COUNT
    ptrs = pages_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + base
    ptrs = ptrs + (row[:, None] * (SIDE.slot_stride // 4) + column[None, :])
    ptrs = ptrs + (FIRST * (SIDE.slot_stride // 4) + CHUNK // PER_HALF * (HALF // 4))
    return gl.load(ptrs)


@gluon.jit
def _decode(words, MODE: gl.constexpr):
    """Words of four codes to twice as many words of two float16 each, exactly."""
    if MODE == "int8_per_token_head":  # (byte ^ 0x80) | 0x6400 is 1152 + x
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b32 biased, a, b, bias;
            mov.b32 bias, 0x64806480;
            xor.b32 biased, $2, 0x80808080;
            prmt.b32 a, biased, 0x64646464, 0x4140;
            prmt.b32 b, biased, 0x64646464, 0x4342;
            sub.f16x2 $0, a, bias;
            sub.f16x2 $1, b, bias;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        low, high = gl.inline_asm_elementwise(
            """
            {
            .reg .b16 a, b;
            mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a;
            cvt.rn.f16x2.e4m3x2 $1, b;
            }
            """,
            "=r,=r,r",
            [words],
            dtype=(gl.int32, gl.int32),
            is_pure=True,
            pack=1,
        )
    return gl.reshape(gl.join(low, high), [words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _clear_rows(words, left):
    """Clear what is not of a key: it would be multiplied by a probability of 0, but may be NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    COUNT: gl.constexpr = 8
    if left < KEYS:
        for i in gl.static_range(KEYS // COUNT):
            rows = words.slice(i * COUNT, COUNT, 0)
            row = i * COUNT + gl.arange(0, COUNT, layout=gl.SliceLayout(1, L))
            rows.store(gl.where((row < left)[:, None], rows.load(L), 0))


@gluon.jit
def _decode_tiles(bufs, barriers, table, start, end, pairs, pairs_done, S: gl.constexpr):
    """8 bits: chunks of codes wait in registers, DEPTH at a time, are decoded and stored as soon as there is room.

    Everything moves in words of 32 bits: a single byte would take a whole register.
    """
    _, k_bufs, rope_bufs, _, _, scale_bufs = bufs
    ready, empty, _, _, _ = barriers
    pages_ptr, _, _, _ = table
    R: gl.constexpr = S.records
    MODE: gl.constexpr = R.v.mode  # of the rope part too, where that has 8 bits
    WORDS: gl.constexpr = gl.NVMMASharedLayout(128, 32)
    words = (
        k_bufs[0]._reinterpret(gl.int32, [2, KEYS, HALF // 2], WORDS),
        k_bufs[1]._reinterpret(gl.int32, [2, KEYS, HALF // 2], WORDS),
    )
    rope_words = rope_bufs._reinterpret(gl.int32, [2, KEYS, ROPE // 2], WORDS)
    PER_HALF: gl.constexpr = CHUNKS // 2
    COUNT: gl.constexpr = KEYS // PER_HALF
    L_ROPE: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    L_SCALE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    token = gl.arange(0, KEYS, layout=L_SCALE)
    rope_row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, L_ROPE))
    rope_column = gl.arange(0, ROPE // 4, layout=gl.SliceLayout(0, L_ROPE))
    record, offset, in_pool = _find_tile(_load_page_id(table, start, S), table, start, S)
    next_page = _load_page_id(table, start + KEYS, S)
    pending = ()
    for i in gl.static_range(DEPTH):
        pending = pending + (_load_codes(pages_ptr, record, offset, i, S),)
    for pair in range(pairs):
        phase = (pairs_done + pair) & 1
        for W in gl.static_range(2):
            first = start + pair * S.tile + W * KEYS
            left = end - first
            page = next_page
            next_page = _load_page_id(table, first + 2 * KEYS, S)
            if R.v.per_token_head:
                scale_ptr = pages_ptr.to(gl.pointer_type(gl.float32), bitcast=True) + record // 4
                row = R.v.scales // 4 + (offset + token) * (R.v.scale_slot_stride // 4)
                scale = gl.load(scale_ptr + row, mask=token < left, other=0.0)
            next_record, next_offset, next_in_pool = record, offset, in_pool
            for i in gl.static_range(CHUNKS):
                if i % PER_HALF == 0:
                    mbarrier.wait(empty.index(2 * W + i // PER_HALF), phase ^ 1)
                if i == 0:
                    next_record, next_offset, next_in_pool = _find_tile(page, table, first + KEYS, S)
                    if R.k.code_bytes != 1:
                        _copy_rope(rope_bufs, ready, table, record, offset, in_pool, W, S)
                if i == PER_HALF and R.k.code_bytes == 1:
                    base = gl.multiple_of((record + (R.k.codes + offset * R.k.slot_stride)) // 4, 4)
                    ptrs = pages_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + base
                    ptrs = ptrs + (rope_row[:, None] * (R.k.slot_stride // 4) + rope_column[None, :])
                    rope = gl.load(ptrs)
                rows = words[i // PER_HALF].index(W).slice(i % PER_HALF * COUNT, COUNT, 0)
                rows.store(_decode(pending[0], MODE))
                if i + DEPTH < CHUNKS:
                    codes = _load_codes(pages_ptr, record, offset, i + DEPTH, S)
                else:
                    codes = _load_codes(pages_ptr, next_record, next_offset, i + DEPTH - CHUNKS, S)
                pending = pending[1:] + (codes,)
                if i % PER_HALF == PER_HALF - 1:
                    _clear_rows(words[i // PER_HALF].index(W), left)
                if i == PER_HALF - 1:
                    fence_async_shared()
                    mbarrier.arrive(ready.index(2 * W), count=1)
            if R.v.per_token_head:
                known = gl.maximum(scale, MIN_SCALE)
                scale_bufs.index(3 * W).store(scale)
                scale_bufs.index(3 * W + 1).store(gl.log2(known))
                scale_bufs.index(3 * W + 2).store(1.0 / known)
            if R.k.code_bytes == 1:
                decoded = _decode(rope, MODE)
                rope_words.index(W).store(gl.where(in_pool, decoded, TWO_NANS))
            fence_async_shared()
            mbarrier.arrive(ready.index(2 * W + 1), count=1)
            if R.k.code_bytes == 1:
                mbarrier.arrive(ready.index(4 + W), count=1)
            record, offset, in_pool = next_record, next_offset, next_in_pool
