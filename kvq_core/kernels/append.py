"""Quantize-on-write: rows of K and V into their slots."""

import triton
import triton.language as tl

from kvq_core.kernels.codec import encode_rows
from kvq_core.kernels.pages import bits_ptr, record_offsets, row_offsets, scale_ptrs


@triton.jit(do_not_specialize=["num_tokens", "num_slots"])
def claim_slots(
    slot_mapping_ptr,  # int32 or int64 [num_tokens]
    num_tokens,
    num_slots,
    winners_ptr,  # out, as slot_mapping [num_slots]: undefined but where a slot is claimed
    TOKENS: tl.constexpr,
):
    """Let every token write its index to its slot's entry: the one that stays may write the slot."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    winner = token.to(winners_ptr.dtype.element_ty)
    tl.store(winners_ptr + slot, winner, mask=(slot >= 0) & (slot < num_slots))


@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "num_pages",
        "k_stride_token",
        "k_stride_head",
        "v_stride_token",
        "v_stride_head",
    ]
)
def append_kv(
    k_ptr,  # [num_tokens, num_kv_heads, head_dim] bfloat16, float16 or float32
    v_ptr,  # [num_tokens, num_kv_heads, head_dim_v]
    slot_mapping_ptr,  # int32 or int64 [num_tokens]
    winners_ptr,  # as slot_mapping [num_slots]: from claim_slots if num_tokens > S.scan, else not read
    k_scale_ptr,  # float32 [], per-tensor modes
    v_scale_ptr,  # float32 []
    pages_ptr,  # in-out uint8, the axes of the layout
    num_tokens,
    num_pages,
    k_stride_token,  # elements / S.k_align
    k_stride_head,
    v_stride_token,  # elements / S.v_align
    v_stride_head,
    pages_out_ptr,  # pages again
    S: tl.constexpr,
):
    """Write S.rows rows, a row being one token of one KV head. Semantics: `kvq_core.reference.append_kv`."""
    R: tl.constexpr = S.records
    K: tl.constexpr = R.k
    V: tl.constexpr = R.v
    CAPS: tl.constexpr = R.caps
    row = tl.program_id(0).to(tl.int64) * S.rows + tl.arange(0, S.rows)
    token = row // R.num_kv_heads
    head = row % R.num_kv_heads
    # Read before anything is known of the slots, so that the two latencies overlap.
    k = _load_rows(k_ptr, token, head, num_tokens, k_stride_token, k_stride_head, K, S.k_align)
    v = _load_rows(v_ptr, token, head, num_tokens, v_stride_token, v_stride_head, V, S.v_align)
    slot = tl.load(slot_mapping_ptr + token, mask=token < num_tokens, other=-1).to(tl.int64)
    writes = (slot >= 0) & (slot < num_pages.to(tl.int64) * R.page_size)
    if num_tokens <= S.scan:
        writes = writes & ~_written_by_later_token(slot_mapping_ptr, token, slot, num_tokens, S.scan)
    else:
        writes = writes & (tl.load(winners_ptr + slot, mask=writes, other=-1).to(tl.int64) == token)
    records = record_offsets(slot // R.page_size, head, R)
    offset = slot % R.page_size
    _store_rows(k, k_scale_ptr, pages_out_ptr, records, offset, writes, K, CAPS)
    _store_rows(v, v_scale_ptr, pages_out_ptr, records, offset, writes, V, CAPS)


@triton.jit
def _written_by_later_token(slot_mapping_ptr, token, slot, num_tokens, SCAN: tl.constexpr):
    """Whether a later token has the same slot: of several tokens with one slot, only the last writes its row."""
    other = tl.arange(0, SCAN)
    other_slot = tl.load(slot_mapping_ptr + other, mask=other < num_tokens, other=-1).to(tl.int64)
    same = (other_slot[None, :] == slot[:, None]) & (other[None, :] > token[:, None])
    return tl.max(same.to(tl.int32), axis=1) > 0


@triton.jit
def _load_rows(x_ptr, token, head, num_tokens, stride_token, stride_head, SIDE: tl.constexpr, ALIGN: tl.constexpr):
    d = tl.arange(0, SIDE.padded_dim)
    row = token * (stride_token.to(tl.int64) * ALIGN) + head * (stride_head.to(tl.int64) * ALIGN)
    mask = (token < num_tokens)[:, None] & (d < SIDE.head_dim)[None, :]
    return tl.load(x_ptr + row[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _store_rows(x, tensor_scale_ptr, pages_ptr, records, offset, writes, SIDE: tl.constexpr, CAPS: tl.constexpr):
    MODE: tl.constexpr = SIDE.mode
    d = tl.arange(0, SIDE.padded_dim)
    codes, row_scales = encode_rows(x, tensor_scale_ptr, MODE, CAPS)
    ALIGN: tl.constexpr = SIDE.align
    element = tl.multiple_of(row_offsets(records, offset, SIDE) // SIDE.code_bytes, ALIGN // SIDE.code_bytes)
    mask = writes[:, None] & (d < SIDE.head_dim)[None, :]
    tl.store(bits_ptr(pages_ptr, SIDE.code_bytes) + element[:, None] + d[None, :], codes, mask=mask)
    if SIDE.per_token_head:
        tl.store(scale_ptrs(pages_ptr, records, offset, SIDE), row_scales, mask=writes)
