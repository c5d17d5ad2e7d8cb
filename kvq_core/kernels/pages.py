"""Device functions that find rows in the pages. Offsets are bytes from the start of the pool, int64."""

import triton
import triton.language as tl


@triton.jit
def record_offsets(page, head, R: tl.constexpr):
    """Offset of the record of (page, head), in a row container that of its first row.

    Both may be tensors of one shape, or scalars.
    """
    ALIGN: tl.constexpr = R.align
    return tl.multiple_of(page.to(tl.int64) * R.page_stride + head.to(tl.int64) * R.head_stride, ALIGN)


@triton.jit
def row_offsets(records, offset, SIDE: tl.constexpr):
    """Offset of the codes of the row at ``offset`` tokens into the page."""
    ALIGN: tl.constexpr = SIDE.align
    if SIDE.is_wide:
        offset = offset.to(tl.int64)
    return tl.multiple_of(records + (SIDE.codes + offset * SIDE.slot_stride), ALIGN)


@triton.jit
def scale_ptrs(pages_ptr, records, offset, SIDE: tl.constexpr):
    """Pointers to the float32 row scales."""
    scales_ptr = pages_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    ALIGN: tl.constexpr = SIDE.align
    if SIDE.is_wide:
        offset = offset.to(tl.int64)
    row = SIDE.scales // 4 + offset * (SIDE.scale_slot_stride // 4)
    return scales_ptr + (tl.multiple_of(records // 4, ALIGN // 4) + row)


@triton.jit
def typed_ptr(pages_ptr, DTYPE: tl.constexpr):
    """The pool seen as elements of an unquantized mode, by name, or as bytes for any other mode."""
    if DTYPE == "bfloat16":
        ptr = pages_ptr.to(tl.pointer_type(tl.bfloat16), bitcast=True)
    elif DTYPE == "float16":
        ptr = pages_ptr.to(tl.pointer_type(tl.float16), bitcast=True)
    elif DTYPE == "float32":
        ptr = pages_ptr.to(tl.pointer_type(tl.float32), bitcast=True)
    else:
        ptr = pages_ptr
    return ptr


@triton.jit
def bits_ptr(ptr, ITEMSIZE: tl.constexpr):
    """A buffer of 8, 16 or 32-bit elements seen as unsigned integers of that size."""
    if ITEMSIZE == 1:
        bits = ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    elif ITEMSIZE == 2:
        bits = ptr.to(tl.pointer_type(tl.uint16), bitcast=True)
    else:
        bits = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    return bits


@triton.jit
def load_page_ids(table_ptr, first, num_pages, max_pages, MASKED: tl.constexpr, TILE: tl.constexpr, R: tl.constexpr):
    """Page id, offset in the page, and validity of the id, for TILE tokens from ``first`` (a multiple of TILE).

    An id outside the pool comes back as 0, a page that is safe to read. With MASKED, table columns at or past
    ``max_pages`` are not read. Where a tile is made of whole pages, or lies in one, each page is looked up once.
    """
    t = tl.arange(0, TILE)
    WHOLE_PAGES: tl.constexpr = TILE % R.page_size == 0
    ONE_PAGE: tl.constexpr = R.page_size % TILE == 0
    PAGES: tl.constexpr = TILE // R.page_size if WHOLE_PAGES else (1 if ONE_PAGE else TILE)
    if WHOLE_PAGES:
        column = first // R.page_size + tl.arange(0, PAGES)
        offset = t % R.page_size
    elif ONE_PAGE:
        column = first // R.page_size + tl.arange(0, PAGES)
        offset = first % R.page_size + t
    else:
        column = (first + t) // R.page_size
        offset = (first + t) % R.page_size
    if MASKED:
        page = tl.load(table_ptr + column, mask=column < max_pages, other=-1)
    else:
        page = tl.load(table_ptr + column)
    in_pool = (page >= 0) & (page < num_pages)
    page = tl.where(in_pool, page, 0)
    if PAGES != TILE:
        page = tl.reshape(tl.broadcast_to(page[:, None], [PAGES, TILE // PAGES]), [TILE])
        in_pool = tl.reshape(tl.broadcast_to(in_pool[:, None], [PAGES, TILE // PAGES]), [TILE])
    return page, offset, in_pool
