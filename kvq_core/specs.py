"""What a kernel is compiled for: frozen values handed to Triton as one constexpr each.

A specification holds what the layout and the static arguments fix, so equal calls of both frameworks compile the same
program. Counts that vary from call to call are never part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvq_core.layout import CacheLayout
from kvq_core.modes import KVQuantMode


@dataclass(frozen=True)
class SideSpec:
    """K or V of a record. Offsets and sizes in bytes."""

    mode: str
    head_dim: int
    padded_dim: int  # a power of two, at least 16, that holds head_dim: Triton tensors have no other sizes
    code_bytes: int
    codes: int  # offset of the codes in the record
    row_bytes: int
    scales: int  # offset of the row scales in the record, meaningless without them
    per_token_head: bool
    per_tensor: bool


@dataclass(frozen=True)
class RecordSpec:
    """A pool of records. ``caps`` says which codecs may run: see `kvq_core.kernels.codec`."""

    page_size: int
    num_kv_heads: int  # of the pages at hand: inside a shard_map the local count
    record_bytes: int
    page_stride: int
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
    v_parts: int  # dots that V is multiplied in: 4 for words of 8-bit codes, else 1
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
    programs: int  # decode: programs a KV head and row block, which share its keys equally


def side_spec(mode: KVQuantMode, head_dim: int, codes: int, scales: int, least_dim: int) -> SideSpec:
    """The specification of K or V rows of ``head_dim`` elements in ``mode``."""
    return SideSpec(
        mode=mode.value,
        head_dim=head_dim,
        padded_dim=max(least_dim, 1 << (head_dim - 1).bit_length()),
        code_bytes=mode.bits // 8,
        codes=codes,
        row_bytes=head_dim * mode.bits // 8,
        scales=scales,
        per_token_head=mode.is_per_token_head,
        per_tensor=mode.is_per_tensor,
    )


def record_spec(layout: CacheLayout, num_kv_heads: int, page_stride: int, caps: str, least_dim: int = 16) -> RecordSpec:
    """The specification of a pool of ``layout`` with ``num_kv_heads`` local heads and ``page_stride`` bytes a page."""
    fields = layout.fields

    def side(name: str, mode: KVQuantMode, head_dim: int) -> SideSpec:
        scales = fields[f"{name}_scales"].offset if mode.is_per_token_head else 0
        return side_spec(mode, head_dim, fields[f"{name}_codes"].offset, scales, least_dim)

    return RecordSpec(
        page_size=layout.page_size,
        num_kv_heads=num_kv_heads,
        record_bytes=layout.record_bytes,
        page_stride=page_stride,
        k=side("k", layout.k_mode, layout.head_dim),
        v=side("v", layout.v_mode, layout.head_dim_v),
        caps=caps,
    )
