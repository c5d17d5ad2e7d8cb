"""What a kernel is compiled for: frozen values handed to Triton as one constexpr each.

A specification holds what the layout and the static arguments fix, so equal calls of both frameworks compile the same
program. Counts that vary from call to call are never part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from kvq_core.layout import FIELD_ALIGNMENT, CacheLayout
from kvq_core.modes import KVQuantMode


@dataclass(frozen=True)
class SideSpec:
    """K or V of a record. Offsets, strides and sizes in bytes; those of scales are meaningless without them."""

    mode: str
    head_dim: int
    padded_dim: int  # a power of two, at least 16, that holds head_dim: Triton tensors have no other sizes
    code_bytes: int
    codes: int  # offset of the codes in the record
    slot_stride: int  # from the codes of a token to those of the next
    scales: int  # offset of the row scales in the record
    scale_slot_stride: int
    align: int  # of every row of codes
    is_wide: bool  # its fields end further into a record than an int32 counts
    per_token_head: bool
    per_tensor: bool


@dataclass(frozen=True)
class RecordSpec:
    """A pool of records; in a row container the rows of one page and KV head are one, wherever they lie.

    ``caps`` says which codecs may run: see `kvq_core.kernels.codec`.
    """

    page_size: int
    num_kv_heads: int  # of the pages at hand: inside a shard_map the local count
    page_stride: int
    head_stride: int
    align: int  # of every record
    k: SideSpec
    v: SideSpec
    caps: str


@dataclass(frozen=True)
class AppendSpec:
    """``rows`` rows (one token of one head) a program; strides are handed over divided by ``*_align``."""

    records: RecordSpec
    rows: int
    k_align: int
    v_align: int
    scan: int  # calls of at most this many tokens find duplicate slots themselves


@dataclass(frozen=True)
class GatherSpec:
    """``tile`` tokens a program, values rounded to ``dtype``."""

    records: RecordSpec
    tile: int
    dtype: str
    for_attention: bool  # V is finite: of a token whose V is not, K becomes NaN, which a mask can hide


@dataclass(frozen=True)
class CopySpec:
    """``chunk`` words (of 32 bits) a program. Words lie in runs, ``inner_runs`` of them for each of the outer axis."""

    page_words: int
    page_stride: int
    run_words: int
    inner_runs: int
    inner_stride: int
    outer_stride: int
    chunk: int


@dataclass(frozen=True)
class AttentionSpec:
    """One attention kernel. ``rows`` query rows a program, a row being one query of one of ``group`` heads."""

    records: RecordSpec
    num_q_heads: int
    group: int  # query heads per KV head
    rows: int
    row_blocks: int  # programs over the rows of one sequence and KV head (decode)
    queries: int  # most queries of a sequence (decode), or queries of a program (prefill)
    tile: int  # keys a step
    keys_first: bool  # how tiles lie: see `kvq_core.kernels.attend`
    q_align: int
    k_operand: str  # dtype of the operands of q k^T: "float16", "bfloat16" or "float32"
    v_operand: str
    fold_v_scales: bool  # V row scales enter the softmax as exponents; else they multiply the probabilities
    k_parts: int  # dots that K is multiplied in: 2 for pairs of 8-bit codes, else 1
    v_parts: int  # dots that V is multiplied in: 2 for pairs of 8-bit codes or halves of a latent, else 1
    late_sums: bool  # probabilities are summed per thread, and across threads only at the end; MLA never asks
    p_shift: float  # probabilities are held times 2**p_shift, so that float16 does not underflow
    normalize_q: bool  # divide q rows by a power of two near their absmax (bfloat16 q in float16 operands)
    sm_scale: float
    causal: bool
    window: int  # 0: none
    softcap: float  # 0.0: none
    has_sinks: bool
    has_alibi: bool
    has_cu_seqlens: bool
    overlap: bool  # decode: the merge is launched early (programmatic dependent launch) and waits for its input
    programs: int  # decode: programs a KV head and row block, which share its keys
    part_stride: int  # decode: float32 numbers from the partial results of a KV head to those of the next


class PoolStrides(NamedTuple):
    """Bytes from page to page, KV head to KV head, slot to slot; ``slot`` None in records, where fields differ."""

    page: int
    head: int
    slot: int | None


def record_spec(
    layout: CacheLayout, num_kv_heads: int, strides: PoolStrides, caps: str, least_dim: int = 16
) -> RecordSpec:
    """The specification of a pool of ``layout`` with ``num_kv_heads`` local heads."""
    align = math.gcd(FIELD_ALIGNMENT, strides.page, strides.head)

    def side(name: str, mode: KVQuantMode, head_dim: int) -> SideSpec:
        codes = layout.fields[f"{name}_codes"]
        scales = layout.fields.get(f"{name}_scales", codes)
        slot_stride = strides.slot or codes.row_bytes
        return SideSpec(
            mode=mode.value,
            head_dim=head_dim,
            padded_dim=max(least_dim, 1 << (head_dim - 1).bit_length()),
            code_bytes=mode.bits // 8,
            codes=codes.offset,
            slot_stride=slot_stride,
            scales=scales.offset,
            scale_slot_stride=strides.slot or scales.row_bytes,
            align=math.gcd(align, codes.offset, slot_stride),
            is_wide=max(codes.offset, scales.offset) + layout.page_size * slot_stride >= 2**31,
            per_token_head=mode.is_per_token_head,
            per_tensor=mode.is_per_tensor,
        )

    return RecordSpec(
        page_size=layout.page_size,
        num_kv_heads=num_kv_heads,
        page_stride=strides.page,
        head_stride=strides.head,
        align=align,
        k=side("k", layout.k_mode, layout.head_dim),
        v=side("v", layout.v_mode, layout.head_dim_v),
        caps=caps,
    )
