"""Pages to dense values, and pages to pages."""

import triton
import triton.language as tl

from kvq_core.kernels.codec import bfloat16_bits, decode_bytes, float16_bits, float32_bits, to_float32
from kvq_core.kernels.pages import bits_ptr, load_page_ids, record_offsets, row_offsets, scale_ptrs, typed_ptr


@triton.jit(do_not_specialize=["num_pages", "max_pages"])
def gather_kv(
    pages_ptr,  # uint8, the axes of the layout
    k_scale_ptr,  # float32 []
    v_scale_ptr,  # float32 []
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    num_pages,
    max_pages,
    k_ptr,  # out S.dtype [num_seqs, max_pages * page_size, num_kv_heads, head_dim]
    v_ptr,  # out S.dtype [num_seqs, max_pages * page_size, num_kv_heads, head_dim_v]
    S: tl.constexpr,
):
    """Dequantize S.tile tokens of one sequence and KV head. Semantics: `kvq_core.reference.gather_kv`."""
    R: tl.constexpr = S.records
    K: tl.constexpr = R.k
    V: tl.constexpr = R.v
    capacity = max_pages * R.page_size
    tiles = tl.cdiv(capacity, S.tile)
    pid = tl.program_id(0)
    head = pid % R.num_kv_heads
    first = (pid // R.num_kv_heads) % tiles * S.tile
    seq = (pid // R.num_kv_heads // tiles).to(tl.int64)
    token = first + tl.arange(0, S.tile)
    page, offset, in_pool = load_page_ids(
        page_table_ptr + seq * max_pages, first, num_pages, max_pages, True, S.tile, R
    )
    filled = token < tl.load(seq_lens_ptr + seq)
    records = record_offsets(page, head, R)
    out_row = (seq * capacity + token) * R.num_kv_heads + head
    exists = token < capacity
    _gather_side(pages_ptr, k_scale_ptr, k_ptr, records, offset, out_row, filled, in_pool, exists, K, S)
    _gather_side(pages_ptr, v_scale_ptr, v_ptr, records, offset, out_row, filled, in_pool, exists, V, S)


@triton.jit
def _gather_side(
    pages_ptr,
    tensor_scale_ptr,
    out_ptr,
    records,
    offset,
    out_row,
    filled,
    in_pool,
    exists,
    SIDE: tl.constexpr,
    S: tl.constexpr,
):
    MODE: tl.constexpr = SIDE.mode
    CAPS: tl.constexpr = S.records.caps
    d = tl.arange(0, SIDE.padded_dim)
    in_row = (d < SIDE.head_dim)[None, :]
    reads = filled & in_pool & exists
    ALIGN: tl.constexpr = SIDE.align
    element = tl.multiple_of(row_offsets(records, offset, SIDE) // SIDE.code_bytes, ALIGN // SIDE.code_bytes)
    elements = element[:, None] + d[None, :]
    if SIDE.code_bytes == 1:
        codes = tl.load(pages_ptr + elements, mask=reads[:, None] & in_row, other=0)
        x = decode_bytes(codes, MODE, CAPS).to(tl.float32)
    else:
        x = to_float32(tl.load(typed_ptr(pages_ptr, MODE) + elements, mask=reads[:, None] & in_row, other=0.0))
    if SIDE.per_token_head:
        x = x * tl.load(scale_ptrs(pages_ptr, records, offset, SIDE), mask=reads, other=1.0)[:, None]
    if SIDE.per_tensor:
        x = x * tl.load(tensor_scale_ptr)
    x = tl.where((filled & ~in_pool)[:, None], float("nan"), x)
    if S.dtype == "float32":
        bits = float32_bits(x)
    elif S.dtype == "bfloat16":
        bits = bfloat16_bits(x)
    else:
        bits = float16_bits(x)
    out = bits_ptr(out_ptr, 4 if S.dtype == "float32" else 2) + out_row[:, None] * SIDE.head_dim + d[None, :]
    tl.store(out, bits, mask=exists[:, None] & in_row)


@triton.jit(do_not_specialize=["num_pairs", "num_pages"])
def copy_pages(
    src_ptr,  # int32 or int64 [num_pairs]
    dst_ptr,  # int32 or int64 [num_pairs]
    pages_ptr,  # in-out uint8, the axes of any layout
    num_pairs,
    num_pages,
    pages_out_ptr,  # pages again
    S: tl.constexpr,
):
    """Copy S.chunk words of one page. Semantics: `kvq_core.reference.copy_pages`."""
    CHUNKS: tl.constexpr = (S.page_words + S.chunk - 1) // S.chunk
    pid = tl.program_id(0)
    src = tl.load(src_ptr + pid // CHUNKS).to(tl.int64)
    dst = tl.load(dst_ptr + pid // CHUNKS).to(tl.int64)
    in_pool = (src >= 0) & (src < num_pages) & (dst >= 0) & (dst < num_pages)
    word = pid % CHUNKS * S.chunk + tl.arange(0, S.chunk)
    mask = in_pool & (word < S.page_words)
    if S.run_words != S.page_words:
        run = (word // S.run_words).to(tl.int64)
        word = run // S.inner_runs * S.outer_stride + run % S.inner_runs * S.inner_stride + word % S.run_words
    words = tl.load(bits_ptr(pages_ptr, 4) + src * S.page_stride + word, mask=mask)
    tl.store(bits_ptr(pages_out_ptr, 4) + dst * S.page_stride + word, words, mask=mask)
