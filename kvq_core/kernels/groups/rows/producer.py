"""The producer: queries, and tiles of keys as right operands in shared memory, by asynchronous copies."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from kvq_core.kernels.groups.line import KEYS, keys_of_segment, next_segment
from kvq_core.kernels.groups.rows.queries import store_queries
from kvq_core.kernels.groups.rows.shared import HALF, ROPE
from kvq_core.kernels.groups.tiles import find_tile, load_page_id, table_of, word_ptrs

TWO_NANS = gl.constexpr(0x7FC07FC0)
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32))  # operands seen as words of two
HALF_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
ROPE_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def produce(bufs, barriers, line, queries, block, pool, S: gl.constexpr):
    """All segments of a part."""
    pairs_done = line.tile.to(gl.int32) * 0
    segments_done = pairs_done
    while line.tile < line.last_tile:
        start, end, seq_end = keys_of_segment(line, S)
        if start < end:
            store_queries(bufs, barriers, line, queries, block, segments_done & 1, S)
            _copy_tiles(bufs, barriers, table_of(pool, line), start, end, pairs_done, S)
            pairs_done += gl.cdiv(end - start, S.tile)
            segments_done += 1
        line = next_segment(line, seq_end, S)
    async_copy.wait_group(0)


@gluon.jit
def _copy_tiles(bufs, barriers, table, start, end, pairs_done, S: gl.constexpr):
    """Copy latents and rope parts of keys ``start`` to ``end``."""
    next_page = load_page_id(table, start, S)
    for i in range(gl.cdiv(end - start, S.tile)):
        phase = (pairs_done + i) & 1
        for W in gl.static_range(2):
            first = start + i * S.tile + W * KEYS
            page = next_page
            next_page = load_page_id(table, first + KEYS, S)
            tile = find_tile(page, table, first, S)
            _copy_latents(bufs, barriers, table, tile, end - first, phase, W, S)
            _copy_rope(bufs, barriers, table, tile, W, S)


@gluon.jit
def _copy_latents(bufs, barriers, table, tile, left, phase, W: gl.constexpr, S: gl.constexpr):
    """Start copying the latents of a tile. Those of no key are cleared: probabilities are 0, but 0 * NaN is NaN."""
    LATENT: gl.constexpr = S.records.v
    ptrs = word_ptrs(table, tile, KEYS, HALF // 2, HALF_WORDS, LATENT)
    exists = (gl.arange(0, KEYS, layout=gl.SliceLayout(1, HALF_WORDS)) < left)[:, None]
    for half in gl.static_range(2):
        words = bufs.latent[half]._reinterpret(gl.int32, [2, KEYS, HALF // 2], WORDS).index(W)
        mbarrier.wait(barriers.empty.index(2 * W + half), phase ^ 1)
        async_copy.async_copy_global_to_shared(words, ptrs + half * (HALF // 2), mask=exists)
        async_copy.mbarrier_arrive(barriers.ready.index(2 * W + half), increment_count=False)


@gluon.jit
def _copy_rope(bufs, barriers, table, tile, W: gl.constexpr, S: gl.constexpr):
    """Start copying rope parts. Those of a page that does not exist are NaN."""
    SIDE: gl.constexpr = S.records.k
    words = bufs.rope._reinterpret(gl.int32, [2, KEYS, ROPE // 2], WORDS).index(W)
    ptrs = word_ptrs(table, tile, KEYS, ROPE // 2, ROPE_WORDS, SIDE)
    async_copy.async_copy_global_to_shared(words, ptrs, mask=tile.in_pool)
    if not tile.in_pool:
        async_copy.commit_group()
        async_copy.wait_group(0)
        # The report below is of copies, but a thread's stores stay ahead of it.
        words.store(gl.full([KEYS, ROPE // 2], TWO_NANS, gl.int32, ROPE_WORDS))
    async_copy.mbarrier_arrive(barriers.ready.index(4 + W), increment_count=False)
