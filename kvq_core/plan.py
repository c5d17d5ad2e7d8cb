"""Launch plans: all that a kernel launch needs but the arrays, from the layout, the shapes and the device.

Pure functions without a framework; equal arguments give equal plans in both. The launchers (`kvq_torch._triton`,
`kvq_jax._triton`, `kvq_core.kernels.interpret`) execute a plan and decide nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

from kvq_core import arguments
from kvq_core.arguments import ArraySpec
from kvq_core.layout import CacheLayout
from kvq_core.modes import KVQuantMode
from kvq_core.specs import AppendSpec, AttentionSpec, GatherSpec, RecordSpec, record_spec

PLANS = functools.lru_cache(maxsize=4096)


@dataclass(frozen=True)
class DeviceFacts:
    """What a plan depends on: ``backend`` "cuda", "hip" or "interpreter", ``arch`` (90 for sm_90), multiprocessors."""

    backend: str
    arch: int
    num_sms: int

    @property
    def caps(self) -> str:
        """Which codecs run: see `kvq_core.kernels.codec`."""
        if self.backend != "cuda":
            return "portable"
        return "ptx_fp8" if self.arch >= 89 else "ptx"


class Output(NamedTuple):
    """An output of a launch: a new buffer, or (``alias``) the array input of that index, updated in place."""

    shape: tuple[int, ...]
    dtype: str
    alias: int | None = None


@dataclass(frozen=True)
class LaunchPlan:
    """One launch of ``kvq_core.kernels.<kernel>``: arrays, ``scalars``, outputs, then ``constexprs`` by name."""

    kernel: str
    grid: tuple[int, int, int]
    scalars: tuple[int, ...]
    outputs: tuple[Output, ...]
    constexprs: tuple[tuple[str, Hashable], ...]
    num_warps: int
    num_stages: int = 1
    enable_fp_fusion: bool = False


class AppendPlan(NamedTuple):
    """``claim``, for calls of many tokens: (slot_mapping) -> (winners). ``append``: (k, v, slot_mapping, winners or
    slot_mapping, k_scale, v_scale, pages) -> (pages)."""

    claim: LaunchPlan | None
    append: LaunchPlan


class AttentionPlan(NamedTuple):
    """``attend``: (q, pages, k_scale, v_scale, sinks or k_scale, alibi_slopes or k_scale, page_table, seq_lens,
    cu_seqlens_q or seq_lens) -> (out, lse), or partial results for ``merge``: (partial_out, partial_lse, sinks or
    k_scale, seq_lens, cu_seqlens_q or seq_lens) -> (out, lse)."""

    attend: LaunchPlan
    merge: LaunchPlan | None


@PLANS
def plan_append_kv(
    layout: CacheLayout,
    pages: ArraySpec,
    k: ArraySpec,
    v: ArraySpec,
    slot_mapping: ArraySpec,
    device: DeviceFacts,
) -> AppendPlan | None:
    """Plan `append_kv`; None if there are no tokens.

    Raises:
        ValueError, TypeError, NotImplementedError: see `kvq_core.arguments.check_append_kv`.
    """
    arguments.check_append_kv(layout, pages, k, v, slot_mapping)
    num_tokens, num_heads, _ = k.shape
    num_pages = pages.shape[0]
    if num_tokens == 0:
        return None
    k_align, v_align = _stride_align(k), _stride_align(v)
    spec = AppendSpec(_records(layout, pages, device), _APPEND_ROWS, k_align, v_align, _APPEND_SCAN)
    append = LaunchPlan(
        kernel="append_kv",
        grid=(math.ceil(num_tokens * num_heads / spec.rows), 1, 1),
        scalars=(
            num_tokens,
            num_pages,
            *(stride // k_align for stride in k.strides[:2]),
            *(stride // v_align for stride in v.strides[:2]),
        ),
        outputs=(Output(pages.shape, "uint8", alias=6),),
        constexprs=(("S", spec),),
        num_warps=4,
    )
    claim = _plan_claim(slot_mapping, num_pages * layout.page_size) if num_tokens > spec.scan else None
    return AppendPlan(claim, append)


# Rows a program quantizes, and the most tokens whose duplicate slots one comparison [rows, tokens] can find.
_APPEND_ROWS = 32
_APPEND_SCAN = 256
_CLAIM_TOKENS = 256


def _plan_claim(slot_mapping: ArraySpec, num_slots: int) -> LaunchPlan:
    (num_tokens,) = slot_mapping.shape
    return LaunchPlan(
        kernel="claim_slots",
        grid=(math.ceil(num_tokens / _CLAIM_TOKENS), 1, 1),
        scalars=(num_tokens, num_slots),
        outputs=(Output((num_slots,), slot_mapping.dtype),),
        constexprs=(("TOKENS", _CLAIM_TOKENS),),
        num_warps=1,
    )


@PLANS
def plan_gather_kv(
    layout: CacheLayout,
    pages: ArraySpec,
    page_table: ArraySpec,
    seq_lens: ArraySpec,
    dtype: str,
    device: DeviceFacts,
) -> LaunchPlan | None:
    """Plan `gather_kv`: (pages, k_scale, v_scale, page_table, seq_lens) -> (k, v); None if the result is empty.

    Raises:
        ValueError, TypeError: see `kvq_core.arguments.check_gather_kv`.
    """
    arguments.check_gather_kv(layout, pages, page_table, seq_lens, dtype)
    num_seqs, max_pages = page_table.shape
    num_heads = pages.shape[1]
    tokens = max_pages * layout.page_size
    if num_seqs * tokens == 0:
        return None
    spec = GatherSpec(_records(layout, pages, device), _GATHER_TILE, dtype)
    return LaunchPlan(
        kernel="gather_kv",
        grid=(num_seqs * num_heads * math.ceil(tokens / spec.tile), 1, 1),
        scalars=(pages.shape[0], max_pages),
        outputs=tuple(
            Output((num_seqs, tokens, num_heads, dim), dtype) for dim in (layout.head_dim, layout.head_dim_v)
        ),
        constexprs=(("S", spec),),
        num_warps=4,
    )


_GATHER_TILE = 32


@PLANS
def plan_copy_pages(pages: ArraySpec, src: ArraySpec, dst: ArraySpec, device: DeviceFacts) -> LaunchPlan | None:
    """Plan `copy_pages`: (src, dst, pages) -> (pages); None if there are no pairs.

    Raises:
        ValueError, TypeError: see `kvq_core.arguments.check_copy_pages`.
    """
    del device  # one plan serves all
    arguments.check_copy_pages(pages, src, dst)
    (num_pairs,) = src.shape
    num_pages, num_heads, record_bytes = pages.shape
    if num_pairs == 0:
        return None
    page_words = num_heads * record_bytes // 4
    return LaunchPlan(
        kernel="copy_pages",
        grid=(num_pairs * math.ceil(page_words / _COPY_WORDS), 1, 1),
        scalars=(num_pairs, num_pages),
        outputs=(Output(pages.shape, "uint8", alias=2),),
        constexprs=(
            ("PAGE_WORDS", page_words),
            ("PAGE_STRIDE_WORDS", (pages.strides[0] if num_pages > 1 else num_heads * record_bytes) // 4),
            ("CHUNK", _COPY_WORDS),
        ),
        num_warps=4,
    )


_COPY_WORDS = 4096


@PLANS
def plan_paged_attention(
    layout: CacheLayout,
    q: ArraySpec,
    pages: ArraySpec,
    page_table: ArraySpec,
    seq_lens: ArraySpec,
    *,
    cu_seqlens_q: ArraySpec | None,
    max_seqlen_q: int | None,
    sm_scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: ArraySpec | None,
    alibi_slopes: ArraySpec | None,
    device: DeviceFacts,
) -> AttentionPlan | None:
    """Plan `paged_attention`; None if there are no queries.

    Few queries a sequence (at most 64 rows of queries x heads of a group) split the keys over programs; more take a
    tile of queries a program.

    Raises:
        ValueError, TypeError, NotImplementedError: see `kvq_core.arguments.check_paged_attention`.
    """
    arguments.check_paged_attention(
        layout,
        q,
        pages,
        page_table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
    )
    if q.shape[0] == 0:
        return None
    group = q.shape[1] // pages.shape[1]
    queries = 1 if cu_seqlens_q is None else max_seqlen_q
    is_decode = queries is not None and (queries == 1 or queries * group <= _DECODE_ROWS)
    rows = min(_MANY_ROWS, _power_of_two(queries * group, least=16)) if is_decode else _power_of_two(group, _MANY_ROWS)
    records = _records(layout, pages, device, least_dim=64 if rows >= _MANY_ROWS else 16)
    shape = _decode_shape(records, group, queries, rows, device) if is_decode else _prefill_shape(records, group, rows)
    operands = _operands(layout, q.dtype, device)
    spec = AttentionSpec(
        records=records,
        num_q_heads=q.shape[1],
        group=group,
        rows=shape.rows,
        row_blocks=shape.row_blocks,
        queries=shape.queries,
        tile=shape.tile,
        q_align=_stride_align(q),
        k_operand=operands.k,
        v_operand=operands.v,
        fold_v_scales=operands.v != "float32",
        v_parts=1 if rows >= _MANY_ROWS else 4,
        p_shift=14.0 if operands.v == "float16" else 0.0,
        normalize_q=operands.k == "float16" and q.dtype == "bfloat16",
        sm_scale=float(layout.head_dim**-0.5 if sm_scale is None else sm_scale),
        causal=bool(causal),
        window=min(window or 0, _FAR),
        softcap=float(softcap or 0.0),
        has_sinks=sinks is not None,
        has_alibi=alibi_slopes is not None,
        has_cu_seqlens=cu_seqlens_q is not None,
        programs=shape.programs,
    )
    if is_decode:
        return _plan_decode(spec, q, page_table, pages, shape)
    return _plan_prefill(spec, q, page_table, pages, shape)


_FAR = 2**30  # a window that hides nothing, and still an int32 when added to a position
_DECODE_ROWS = 64  # more query rows a KV head than this take the prefill kernel
# From so many rows Hopper's dots take their right operand from shared memory. Narrow ones (less than 128 bytes) are
# miscompiled by Triton 3.6: it computes negative shared-memory offsets.
_MANY_ROWS = 64


class _Operands(NamedTuple):
    k: str
    v: str


class _AttentionShape(NamedTuple):
    rows: int
    row_blocks: int
    queries: int
    tile: int
    num_warps: int
    num_stages: int
    programs: int


def _operands(layout: CacheLayout, q_dtype: str, device: DeviceFacts) -> _Operands:
    """Operand dtypes of the two dots: 8-bit codes are exact in float16; dtypes that differ meet in float32.

    The interpreter multiplies the bit patterns of bfloat16, so there bfloat16 goes through float32 too.
    """

    def operand(mode: KVQuantMode) -> str:
        if q_dtype == "float32":
            return "float32"
        if mode.bits == 8:
            return "float16"
        if mode.value == q_dtype and not (q_dtype == "bfloat16" and device.backend == "interpreter"):
            return q_dtype
        return "float32"

    return _Operands(operand(layout.k_mode), operand(layout.v_mode))


def _decode_shape(records: RecordSpec, group: int, queries: int, rows: int, device: DeviceFacts) -> _AttentionShape:
    row_blocks = math.ceil(queries * group / rows)
    state = rows * max(records.k.padded_dim, records.v.padded_dim)
    num_warps = max(1, min(8, state // 2048))
    programs = device.num_sms * max(1, _DECODE_WARPS_PER_SM // num_warps)
    return _AttentionShape(
        rows=rows,
        row_blocks=row_blocks,
        queries=queries,
        tile=_tile(records),
        num_warps=num_warps,
        num_stages=2,
        programs=max(1, programs // (records.num_kv_heads * row_blocks)),
    )


_DECODE_WARPS_PER_SM = 8  # what fits: each thread uses nearly all the 255 registers it can have


def _prefill_shape(records: RecordSpec, group: int, rows: int) -> _AttentionShape:
    return _AttentionShape(
        rows=rows,
        row_blocks=1,
        queries=rows // group,
        tile=_tile(records),
        num_warps=4 if max(records.k.padded_dim, records.v.padded_dim) <= 256 else 8,
        num_stages=2,
        programs=1,
    )


def _tile(records: RecordSpec) -> int:
    """Keys a step: 32 KiB of K and V, at most 64 keys, at least the 16 that a dot takes."""
    key_bytes = sum(side.padded_dim * side.code_bytes for side in (records.k, records.v))
    return max(16, min(64, 2**15 // key_bytes))


def _plan_decode(
    spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec, shape: _AttentionShape
) -> AttentionPlan:
    num_seqs, max_pages = page_table.shape
    num_q_tokens, num_q_heads, _ = q.shape
    records = spec.records
    num_segments = num_seqs + spec.programs
    partial_rows = (num_segments, records.num_kv_heads, spec.queries * spec.group)
    attend = LaunchPlan(
        kernel="attend_segments",
        grid=(spec.programs * spec.row_blocks * records.num_kv_heads, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=(Output((*partial_rows, records.v.head_dim), "float32"), Output(partial_rows, "float32")),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )
    merge = LaunchPlan(
        kernel="merge_segments",
        grid=(num_q_tokens * num_q_heads, 1, 1),
        scalars=(num_q_tokens, num_seqs, max_pages),
        outputs=_attention_outputs(q, records.v.head_dim),
        constexprs=(("S", spec), ("SPLITS", 32)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return AttentionPlan(attend, merge)


def _plan_prefill(
    spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec, shape: _AttentionShape
) -> AttentionPlan:
    num_tiles = math.ceil(q.shape[0] / spec.queries) + page_table.shape[0] + 1
    attend = LaunchPlan(
        kernel="attend_queries",
        grid=(num_tiles * spec.records.num_kv_heads, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=_attention_outputs(q, spec.records.v.head_dim),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )
    return AttentionPlan(attend, None)


def _attend_scalars(spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec) -> tuple[int, ...]:
    num_seqs, max_pages = page_table.shape
    strides = (stride // spec.q_align for stride in q.strides[:2])
    return (q.shape[0], num_seqs, pages.shape[0], max_pages, *strides)


def _attention_outputs(q: ArraySpec, head_dim_v: int) -> tuple[Output, Output]:
    return Output((*q.shape[:2], head_dim_v), q.dtype), Output(q.shape[:2], "float32")


def _records(layout: CacheLayout, pages: ArraySpec, device: DeviceFacts, least_dim: int = 16) -> RecordSpec:
    num_heads = pages.shape[1]
    # The stride of an axis of length 1 says nothing, and differs between frameworks.
    page_stride = pages.strides[0] if pages.shape[0] > 1 else num_heads * layout.record_bytes
    return record_spec(layout, num_heads, page_stride, device.caps, least_dim)


def _stride_align(x: ArraySpec) -> int:
    """The power of two, up to 16, that divides both outer strides: how far loads may be vectorized."""
    return math.gcd(16, *x.strides[:2])


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
