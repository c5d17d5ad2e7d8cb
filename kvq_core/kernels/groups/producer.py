"""The producer: queries, and tiles of keys as right operands in shared memory."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from kvq_core.kernels.attend import MIN_SCALE
from kvq_core.kernels.groups.codec import decode_words
from kvq_core.kernels.groups.queries import store_queries
from kvq_core.kernels.groups.shared import HALF, KEYS, ROPE, keys_of_segment, next_segment

TWO_NANS = gl.constexpr(0x7FC07FC0)  # in bfloat16 and in float16
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32))  # 16-bit operands seen as words of two
CODES = gl.constexpr(gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0]))  # rows as words of four codes
ROPE_CODES = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
ROPE_WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))


class Table(NamedTuple):
    """The pages of one sequence."""

    pages_ptr: Any
    ids_ptr: Any
    num_pages: Any
    max_pages: Any


class Tile(NamedTuple):
    """Where a tile lies: offset of its page in bytes, tokens from the page's first, and whether the page exists."""

    record: Any
    offset: Any
    in_pool: Any


class Ahead(NamedTuple):
    """What is on its way: a tile, the codes of its lower half, and in per-token-head modes its row scales."""

    tile: Any
    codes: Any
    scale: Any


@gluon.jit
def produce(bufs, barriers, line, queries, pool, S: gl.constexpr):
    """All segments of a part."""
    pages_ptr, page_table_ptr, num_pages, max_pages = pool
    pairs_done = line.tile.to(gl.int32) * 0
    segments_done = pairs_done
    while line.tile < line.last_tile:
        start, end, seq_end = keys_of_segment(line, S)
        if start < end:
            table = Table(pages_ptr, page_table_ptr + line.seq.to(gl.int64) * max_pages, num_pages, max_pages)
            store_queries(bufs, barriers, line, queries, segments_done & 1, S)
            if S.records.v.code_bytes == 1:
                _decode_tiles(bufs, barriers, table, start, end, pairs_done, S)
            else:
                _copy_tiles(bufs, barriers, table, start, end, pairs_done, S)
            pairs_done += gl.cdiv(end - start, S.tile)
            segments_done += 1
        line = next_segment(line, seq_end, S)
    if S.records.k.code_bytes != 1:
        async_copy.wait_group(0)


@gluon.jit
def _load_page_id(table, first, S: gl.constexpr):
    """The page of the tile from ``first``, as the table says. Past the last column, anything."""
    column = gl.minimum(first // S.records.page_size, table.max_pages - 1)
    return gl.load(table.ids_ptr + column)


@gluon.jit
def _find_tile(page, table, first, S: gl.constexpr):
    """The tile from ``first``; that of a page that does not exist in page 0, which is safe to read."""
    ALIGN: gl.constexpr = S.records.align
    in_pool = (page >= 0) & (page < table.num_pages)
    record = gl.where(in_pool, page, 0).to(gl.int64) * S.records.page_stride
    return Tile(gl.multiple_of(record, ALIGN), first % S.records.page_size, in_pool)


@gluon.jit
def _word_ptrs(
    table, tile, FIRST: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr, L: gl.constexpr, SIDE: gl.constexpr
):
    """Pointers to words of 32 bits of rows of latents or rope parts, from word ``FIRST`` of the tile's first row."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    base = gl.multiple_of((tile.record + (SIDE.codes + tile.offset * SIDE.slot_stride)) // 4, 4)
    ptrs = table.pages_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + base
    ptrs = ptrs + (row[:, None] * (SIDE.slot_stride // 4) + column[None, :])
    return ptrs + FIRST


@gluon.jit
def _prefetch_tile(table, page, first, end, S: gl.constexpr):
    """Bring the tile from ``first`` into the L2 cache. Few loads fit into registers: there they are short."""
    LATENT: gl.constexpr = S.records.v
    ROPE_PART: gl.constexpr = S.records.k
    tile = _find_tile(page, table, first, S)
    base = table.pages_ptr + tile.record
    if first < end:
        _prefetch(base + (LATENT.codes + tile.offset * LATENT.slot_stride), KEYS * LATENT.slot_stride)
        _prefetch(base + (ROPE_PART.codes + tile.offset * ROPE_PART.slot_stride), KEYS * ROPE_PART.slot_stride)
        if LATENT.per_token_head:
            _prefetch(base + (LATENT.scales + tile.offset * LATENT.scale_slot_stride), KEYS * LATENT.scale_slot_stride)


@gluon.jit
def _prefetch(ptr, BYTES: gl.constexpr):
    gl.inline_asm_elementwise(
        """
        {
        .reg .pred is_first;
        .reg .b32 thread;
        mov.u32 thread, %tid.x;
        and.b32 thread, thread, 127;
        setp.eq.u32 is_first, thread, 0;
        @is_first cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [ptr, gl.to_tensor(BYTES)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


# bfloat16: asynchronous copies, 16 bytes a thread.


@gluon.jit
def _copy_tiles(bufs, barriers, table, start, end, pairs_done, S: gl.constexpr):
    """Copy latents and rope parts of keys ``start`` to ``end``."""
    SIDE: gl.constexpr = S.records.v
    L: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    row = gl.arange(0, KEYS, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, HALF, layout=gl.SliceLayout(0, L))
    offsets = row[:, None] * (SIDE.slot_stride // 2) + column[None, :]
    next_page = _load_page_id(table, start, S)
    for i in range(gl.cdiv(end - start, S.tile)):
        phase = (pairs_done + i) & 1
        for W in gl.static_range(2):
            first = start + i * S.tile + W * KEYS
            page = next_page
            next_page = _load_page_id(table, first + KEYS, S)
            tile = _find_tile(page, table, first, S)
            base = gl.multiple_of((tile.record + (SIDE.codes + tile.offset * SIDE.slot_stride)) // 2, 8)
            ptrs = table.pages_ptr.to(gl.pointer_type(gl.bfloat16), bitcast=True) + base + offsets
            exists = (row < end - first)[:, None]  # other rows are cleared: probabilities are 0, but 0 * NaN is NaN
            for half in gl.static_range(2):
                mbarrier.wait(barriers.empty.index(2 * W + half), phase ^ 1)
                async_copy.async_copy_global_to_shared(bufs.latent[half].index(W), ptrs + half * HALF, mask=exists)
                async_copy.mbarrier_arrive(barriers.ready.index(2 * W + half), increment_count=False)
            _copy_rope(bufs, barriers, table, tile, W, S)


@gluon.jit
def _copy_rope(bufs, barriers, table, tile, W: gl.constexpr, S: gl.constexpr):
    """Start copying rope parts. Those of a page that does not exist are NaN."""
    SIDE: gl.constexpr = S.records.k
    words = bufs.rope._reinterpret(gl.int32, [2, KEYS, ROPE // 2], WORDS).index(W)
    ptrs = _word_ptrs(table, tile, 0, KEYS, ROPE // 2, ROPE_WORDS, SIDE)
    async_copy.async_copy_global_to_shared(words, ptrs, mask=tile.in_pool)
    if not tile.in_pool:
        async_copy.commit_group()
        async_copy.wait_group(0)
        words.store(gl.full([KEYS, ROPE // 2], TWO_NANS, gl.int32, ROPE_WORDS))
    async_copy.mbarrier_arrive(barriers.ready.index(4 + W), increment_count=False)


# 8 bits: the codes of a half wait in registers until there is room. Everything moves in words of 32 bits: a single byte
# would take a whole register.


@gluon.jit
def _decode_tiles(bufs, barriers, table, start, end, pairs_done, S: gl.constexpr):
    """Decode latents, and rope parts that have 8 bits, of keys ``start`` to ``end``."""
    tile = _find_tile(_load_page_id(table, start, S), table, start, S)
    next_page = _load_page_id(table, start + KEYS, S)
    ahead = Ahead(tile, _load_half(table, tile, 0, S), _load_scales(table, tile, end - start, S))
    for pair in range(gl.cdiv(end - start, S.tile)):
        phase = (pairs_done + pair) & 1
        for W in gl.static_range(2):
            first = start + pair * S.tile + W * KEYS
            page = next_page
            next_page = _load_page_id(table, first + 2 * KEYS, S)
            _prefetch_tile(table, page, first + KEYS, end, S)
            ahead = _decode_tile(bufs, barriers, table, ahead, page, first, end, phase, W, S)


@gluon.jit
def _decode_tile(bufs, barriers, table, ahead, next_page, first, end, phase, W: gl.constexpr, S: gl.constexpr):
    """Decode the tile of stage ``W``. Returns what is on its way of the next.

    Loads follow the fences: a fence waits for all that is on its way.
    """
    ROPE_PART: gl.constexpr = S.records.k
    MODE: gl.constexpr = S.records.v.mode  # of the rope part too, where that has 8 bits
    left = end - first
    tile = ahead.tile
    next_tile = _find_tile(next_page, table, first + KEYS, S)

    words = bufs.latent[0]._reinterpret(gl.int32, [2, KEYS, HALF // 2], WORDS).index(W)
    mbarrier.wait(barriers.empty.index(2 * W), phase ^ 1)
    words.store(decode_words(ahead.codes, MODE))
    _clear_rows(words, left)
    fence_async_shared()
    mbarrier.arrive(barriers.ready.index(2 * W), count=1)
    codes = _load_half(table, tile, 1, S)
    if ROPE_PART.code_bytes == 1:
        rope_codes = gl.load(_word_ptrs(table, tile, 0, KEYS, ROPE // 4, ROPE_CODES, ROPE_PART))
    else:
        _copy_rope(bufs, barriers, table, tile, W, S)

    words = bufs.latent[1]._reinterpret(gl.int32, [2, KEYS, HALF // 2], WORDS).index(W)
    mbarrier.wait(barriers.empty.index(2 * W + 1), phase ^ 1)
    if S.records.v.per_token_head:
        _store_scales(bufs, ahead.scale, W)  # nobody reads the stage's row scales once both halves are empty
    words.store(decode_words(codes, MODE))
    _clear_rows(words, left)
    if ROPE_PART.code_bytes == 1:
        words = bufs.rope._reinterpret(gl.int32, [2, KEYS, ROPE // 2], WORDS).index(W)
        words.store(gl.where(tile.in_pool, decode_words(rope_codes, MODE), TWO_NANS))
    fence_async_shared()
    mbarrier.arrive(barriers.ready.index(2 * W + 1), count=1)
    if ROPE_PART.code_bytes == 1:
        mbarrier.arrive(barriers.ready.index(4 + W), count=1)
    return Ahead(next_tile, _load_half(table, next_tile, 0, S), _load_scales(table, next_tile, left - KEYS, S))


@gluon.jit
def _load_half(table, tile, HALF_INDEX: gl.constexpr, S: gl.constexpr):
    """Codes of one half of the columns of a tile, as words of four: [KEYS, 64]."""
    SIDE: gl.constexpr = S.records.v
    return gl.load(_word_ptrs(table, tile, HALF_INDEX * (HALF // 4), KEYS, HALF // 4, CODES, SIDE))


@gluon.jit
def _clear_rows(words, left):
    """Clear what is not of a key: its probabilities are 0, but 0 * NaN is NaN."""
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
    COUNT: gl.constexpr = 8
    if left < KEYS:
        for i in gl.static_range(KEYS // COUNT):
            rows = words.slice(i * COUNT, COUNT, 0)
            row = i * COUNT + gl.arange(0, COUNT, layout=gl.SliceLayout(1, L))
            rows.store(gl.where((row < left)[:, None], rows.load(L), 0))


@gluon.jit
def _load_scales(table, tile, left, S: gl.constexpr):
    """Row scales of a tile, float32; 0 where there is no key. In other modes, anything."""
    SIDE: gl.constexpr = S.records.v
    scale = left
    if SIDE.per_token_head:
        token = gl.arange(0, KEYS, layout=gl.BlockedLayout([1], [32], [4], [0]))
        scale_ptr = table.pages_ptr.to(gl.pointer_type(gl.float32), bitcast=True) + tile.record // 4
        row = SIDE.scales // 4 + (tile.offset + token) * (SIDE.scale_slot_stride // 4)
        scale = gl.load(scale_ptr + row, mask=token < left, other=0.0)
    return scale


@gluon.jit
def _store_scales(bufs, scale, W: gl.constexpr):
    known = gl.maximum(scale, MIN_SCALE)  # of a NaN and a number, the number: the scale itself is in the scores
    bufs.scales.index(3 * W).store(scale)
    bufs.scales.index(3 * W + 1).store(gl.log2(known))
    bufs.scales.index(3 * W + 2).store(1.0 / known)
