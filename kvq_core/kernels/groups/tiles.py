"""Where tiles lie: pages of a sequence, addresses of words, and how a tile comes into L2 ahead of its turn."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvq_core.kernels.groups.line import KEYS


class Pool(NamedTuple):
    """The pages of all sequences."""

    pages_ptr: Any
    page_table_ptr: Any
    num_pages: Any
    max_pages: Any


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


@gluon.jit
def table_of(pool, line):
    """The pages of the sequence at hand."""
    ids_ptr = pool.page_table_ptr + line.seq.to(gl.int64) * pool.max_pages
    return Table(pool.pages_ptr, ids_ptr, pool.num_pages, pool.max_pages)


@gluon.jit
def load_page_id(table, first, S: gl.constexpr):
    """The page of the tile from ``first``, as the table says. Past the last column, anything."""
    column = gl.minimum(first // S.records.page_size, table.max_pages - 1)
    return gl.load(table.ids_ptr + column)


@gluon.jit
def find_tile(page, table, first, S: gl.constexpr):
    """The tile from ``first``; that of a page that does not exist in page 0, which is safe to read."""
    ALIGN: gl.constexpr = S.records.align
    in_pool = (page >= 0) & (page < table.num_pages)
    record = gl.where(in_pool, page, 0).to(gl.int64) * S.records.page_stride
    return Tile(gl.multiple_of(record, ALIGN), first % S.records.page_size, in_pool)


@gluon.jit
def rows_from(tile, first):
    """The rest of a tile from a row on."""
    return Tile(tile.record, tile.offset + first, tile.in_pool)


@gluon.jit
def word_ptrs(table, tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr, L: gl.constexpr, SIDE: gl.constexpr):
    """Pointers to the words of 32 bits [ROWS, COLUMNS] of the latents or rope parts of a tile's first rows."""
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    column = gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, L))
    base = gl.multiple_of((tile.record + (SIDE.codes + tile.offset * SIDE.slot_stride)) // 4, 4)
    ptrs = table.pages_ptr.to(gl.pointer_type(gl.int32), bitcast=True) + base
    return ptrs + (row[:, None] * (SIDE.slot_stride // 4) + column[None, :])


@gluon.jit
def scale_ptrs(table, tile, L: gl.constexpr, SIDE: gl.constexpr):
    """Pointers to the row scales of a tile."""
    token = gl.arange(0, KEYS, layout=L)
    base = gl.multiple_of((tile.record + (SIDE.scales + tile.offset * SIDE.scale_slot_stride)) // 4, 4)
    ptrs = table.pages_ptr.to(gl.pointer_type(gl.float32), bitcast=True) + base
    return ptrs + token * (SIDE.scale_slot_stride // 4)


@gluon.jit
def prefetch_tile(table, page, first, end, S: gl.constexpr):
    """Bring the tile from ``first`` into the L2 cache, from where it takes less time to get than room is free."""
    LATENT: gl.constexpr = S.records.v
    ROPE_PART: gl.constexpr = S.records.k
    tile = find_tile(page, table, first, S)
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
