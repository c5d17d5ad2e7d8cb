"""Pages to dense values, and pages to pages."""

import triton
import triton.language as tl

from kvq_core.kernels.codec import bfloat16_bits, decode_bytes, float16_bits, float32_bits, to_float32
from kvq_core.kernels.pages import bits_ptr, load_page_ids, record_offsets, row_offsets, scale_ptrs, typed_ptr


@triton.jit(do_not_specialize=["num_pages", "max_pages", "num_tokens"])
def gather_kv(
    pages_ptr,  # uint8, the axes of the layout
    k_scale_ptr,  # float32 []
    v_scale_ptr,  # float32 []
    page_table_ptr,  # int32 [num_seqs, max_pages]
    seq_lens_ptr,  # int32 [num_seqs]
    num_pages,
    max_pages,
    num_tokens,
    k_ptr,  # out S.dtype [num_seqs, num_tokens, num_kv_heads, head_dim]
    v_ptr,  # out S.dtype [num_seqs, num_tokens, num_kv_heads, head_dim_v]
    S: tl.constexpr,
):
    """Dequantize S.tile tokens of one sequence and KV head. Semantics: `kvq_core.reference.gather_kv`."""
    R: tl.constexpr = S.records
    K: tl.constexpr = R.k
    V: tl.constexpr = R.v
    tiles = tl.cdiv(num_tokens, S.tile)
    pid = tl.program_id(0)
    head = pid % R.num_kv_heads
    first = (pid // R.num_kv_heads) % tiles * S.tile
    seq = (pid // R.num_kv_heads // tiles).to(tl.int64)
    token = first + tl.arange(0, S.tile)
    page, offset, in_pool = load_page_ids(
        page_table_ptr + seq * max_pages, first, num_pages, max_pages, True, S.tile, R
    )
    filled = token < tl.load(seq_lens_ptr + seq)
    exists = token < num_tokens
    reads = filled & in_pool & exists
    records = record_offsets(page, head, R)
    k = _read_rows(pages_ptr, k_scale_ptr, records, offset, reads, K, S)
    v = _read_rows(pages_ptr, v_scale_ptr, records, offset, reads, V, S)
    missing = filled & ~in_pool
    if S.for_attention:
        missing |= ~(tl.max(tl.abs(v).to(tl.int32, bitcast=True), axis=1) < 0x7F7F8000)  # rounds to a finite bfloat16
        v = tl.where(missing[:, None], 0.0, v)
    else:
        v = tl.where(missing[:, None], float("nan"), v)
    k = tl.where(missing[:, None], float("nan"), k)
    out_row = (seq * num_tokens + token) * R.num_kv_heads + head
    _write_rows(k_ptr, k, out_row, exists, K, S)
    _write_rows(v_ptr, v, out_row, exists, V, S)


@triton.jit
def _read_rows(pages_ptr, tensor_scale_ptr, records, offset, reads, SIDE: tl.constexpr, S: tl.constexpr):
    """Rows of K or V in float32, zeros where not ``reads``."""
    MODE: tl.constexpr = SIDE.mode
    CAPS: tl.constexpr = S.records.caps
    ALIGN: tl.constexpr = SIDE.align
    d = tl.arange(0, SIDE.padded_dim)
    mask = reads[:, None] & (d < SIDE.head_dim)[None, :]
    element = tl.multiple_of(row_offsets(records, offset, SIDE) // SIDE.code_bytes, ALIGN // SIDE.code_bytes)
    elements = element[:, None] + d[None, :]
    if SIDE.code_bytes == 1:
        x = decode_bytes(tl.load(pages_ptr + elements, mask=mask, other=0), MODE, CAPS).to(tl.float32)
    else:
        x = to_float32(tl.load(typed_ptr(pages_ptr, MODE) + elements, mask=mask, other=0.0))
    if SIDE.per_token_head:
        x = x * tl.load(scale_ptrs(pages_ptr, records, offset, SIDE), mask=reads, other=1.0)[:, None]
    if SIDE.per_tensor:
        x = x * tl.load(tensor_scale_ptr)
    return x


@triton.jit
def _write_rows(out_ptr, x, row, exists, SIDE: tl.constexpr, S: tl.constexpr):
    if S.dtype == "float32":
        bits = float32_bits(x)
    elif S.dtype == "bfloat16":
        bits = bfloat16_bits(x)
    else:
        bits = float16_bits(x)
    d = tl.arange(0, SIDE.padded_dim)
    ptrs = bits_ptr(out_ptr, 4 if S.dtype == "float32" else 2) + row[:, None] * SIDE.head_dim + d[None, :]
    tl.store(ptrs, bits, mask=exists[:, None] & (d < SIDE.head_dim)[None, :])


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
