"""The producer: copies tiles of codes into shared memory, as they are."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from kvq_core.kernels.groups.columns.shared import RANK, ROPE, parts_of, shares_columns, stages_of
from kvq_core.kernels.groups.line import KEYS, keys_of_segment, next_segment
from kvq_core.kernels.groups.tiles import (
    find_tile,
    load_page_id,
    prefetch_tile,
    rows_from,
    scale_ptrs,
    table_of,
    word_ptrs,
)

LATENT_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0]))
SCALES = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.jit
def produce(bufs, barriers, line, pool, S: gl.constexpr):
    """All segments of a part."""
    tiles_done = line.tile.to(gl.int32) * 0
    while line.tile < line.last_tile:
        start, end, seq_end = keys_of_segment(line, S)
        if start < end:
            table = table_of(pool, line)
            tiles = gl.cdiv(end - start, S.tile) * (S.tile // KEYS)
            _copy_tiles(bufs, barriers, table, start, end, tiles, tiles_done, S)
            tiles_done += tiles
        line = next_segment(line, seq_end, S)
    async_copy.wait_group(0)


@gluon.jit
def _copy_tiles(bufs, barriers, table, start, end, tiles, tiles_done, S: gl.constexpr):
    STAGES: gl.constexpr = stages_of(S)
    PARTS: gl.constexpr = parts_of(S)
    next_page = load_page_id(table, start, S)
    for i in range(tiles):
        first = start + i * KEYS
        tile = find_tile(next_page, table, first, S)
        next_page = load_page_id(table, first + KEYS, S)
        turn = tiles_done + i
        stage = turn % STAGES
        if shares_columns(S):  # else memory is what takes the time, and tiles are on their way early enough
            prefetch_tile(table, next_page, first + KEYS, end, S)
        for part in gl.static_range(PARTS):
            mbarrier.wait(barriers.empty.index(stage * PARTS + part), (turn // STAGES & 1) ^ 1)
            _copy_latents(bufs, table, tile, stage, end - first, part, S)
        _copy_scales(bufs, table, tile, stage, S)
        _copy_rope(bufs, table, tile, stage, S)
        async_copy.mbarrier_arrive(barriers.ready.index(stage), increment_count=False)


@gluon.jit
def _copy_latents(bufs, table, tile, stage, left, PART: gl.constexpr, S: gl.constexpr):
    """Start copying latents of a part of a tile of which ``left`` keys exist.

    Latents of no key are cleared: probabilities are 0, but 0 * NaN is NaN.
    """
    LATENT: gl.constexpr = S.records.v
    SIZE: gl.constexpr = KEYS // parts_of(S)
    ptrs = word_ptrs(table, rows_from(tile, PART * SIZE), SIZE, RANK // 4, LATENT_WORDS, LATENT)
    exists = PART * SIZE + gl.arange(0, SIZE, layout=gl.SliceLayout(1, LATENT_WORDS)) < left
    words = bufs.codes.index(stage).slice(PART * SIZE, SIZE, 0)
    async_copy.async_copy_global_to_shared(words, ptrs, mask=exists[:, None])


@gluon.jit
def _copy_scales(bufs, table, tile, stage, S: gl.constexpr):
    """Start copying row scales, if there are any."""
    LATENT: gl.constexpr = S.records.v
    if LATENT.per_token_head:
        ptrs = scale_ptrs(table, tile, SCALES, LATENT)
        async_copy.async_copy_global_to_shared(bufs.scales.index(stage), ptrs)


@gluon.jit
def _copy_rope(bufs, table, tile, stage, S: gl.constexpr):
    """Start copying rope parts. Those of a page that does not exist are NaN."""
    SIDE: gl.constexpr = S.records.k
    WORDS: gl.constexpr = ROPE * SIDE.code_bytes // 4
    NANS: gl.constexpr = 0x7F7F7F7F if SIDE.code_bytes == 1 else 0x7FC07FC0
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [4, 1], [1, 0])
    words = bufs.rope.index(stage)
    ptrs = word_ptrs(table, tile, KEYS, WORDS, LAYOUT, SIDE)
    async_copy.async_copy_global_to_shared(words, ptrs, mask=tile.in_pool)
    if not tile.in_pool:
        async_copy.commit_group()
        async_copy.wait_group(0)
        # The report below is of copies, but a thread's stores stay ahead of it.
        words.store(gl.full([KEYS, WORDS], NANS, gl.int32, LAYOUT))
