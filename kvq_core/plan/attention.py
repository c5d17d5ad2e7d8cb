"""Plans of attention: which kernel, how many rows and keys a step, how many programs."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvq_core import arguments
from kvq_core.arguments import ArraySpec, AttentionCall
from kvq_core.layout import CacheLayout
from kvq_core.modes import KVQuantMode
from kvq_core.plan.launch import DeviceFacts, LaunchPlan, Output, cached, pool_spec, stride_align
from kvq_core.specs import AttentionSpec, RecordSpec


class AttentionPlan(NamedTuple):
    """The one or two launches of an attention.

    ``attend``: (q, pages, k_scale, v_scale, sinks or k_scale, alibi_slopes or k_scale, page_table, seq_lens,
    cu_seqlens_q or seq_lens) -> (out, lse), or partial results for ``merge``: (partial, sinks or k_scale, seq_lens,
    cu_seqlens_q or seq_lens) -> (out, lse).
    """

    attend: LaunchPlan
    merge: LaunchPlan | None


@cached
def plan_paged_attention(layout: CacheLayout, call: AttentionCall, device: DeviceFacts) -> AttentionPlan | None:
    """Plan `paged_attention`; None if there are no queries.

    Few queries a sequence (at most 64 rows of queries x heads of a group) split the keys over programs; more take a
    tile of queries a program.

    Raises:
        ValueError, TypeError, NotImplementedError: see `kvq_core.arguments.check_paged_attention`.
    """
    arguments.check_paged_attention(layout, call)
    q, pages, page_table = call.q, call.pages, call.page_table
    if q.shape[0] == 0:
        return None
    queries = _few_queries(call.cu_seqlens_q, call.max_seqlen_q, q.shape[1] // pages.shape[layout.head_axis])
    spec, shape = specify_attention(layout, call, device, queries)
    if queries is None:
        return AttentionPlan(plan_prefill(spec, shape, q, page_table, pages), None)
    return _plan_decode(spec, q, page_table, pages, shape)


def specify_attention(
    layout: CacheLayout, call: AttentionCall, device: DeviceFacts, queries: int | None
) -> tuple[AttentionSpec, AttentionShape]:
    """The kernel for at most ``queries`` queries a sequence, its keys split over programs; None splits the queries."""
    q, pages = call.q, call.pages
    group = q.shape[1] // pages.shape[layout.head_axis]
    operands = _operands(layout, q.dtype, device)
    most_rows = _FLOAT32_ROWS if "float32" in operands else _MANY_ROWS
    rows = _power_of_two(group, most_rows) if queries is None else min(_power_of_two(queries * group, 8), most_rows)
    records = pool_spec(layout, pages, device, least_dim=64 if rows >= _MANY_ROWS else 16)
    if queries is None:
        shape = _prefill_shape(records, group, rows, operands)
    else:
        shape = _decode_shape(records, group, queries, rows, operands, device)
    shape = _fit(shape, records, operands, device)
    spec = AttentionSpec(
        records=records,
        num_q_heads=q.shape[1],
        group=group,
        rows=shape.rows,
        row_blocks=shape.row_blocks,
        queries=shape.queries,
        tile=shape.tile,
        keys_first=rows < _MANY_ROWS,
        q_align=stride_align(q),
        k_operand=operands.k,
        v_operand=operands.v,
        fold_v_scales=operands.v != "float32",
        k_parts=shape.k_parts,
        v_parts=2 if records.v.code_bytes == 1 and rows < _MANY_ROWS else 1,
        late_sums=rows < _MANY_ROWS and shape.num_warps > 1,
        p_shift=14.0 if operands.v == "float16" else 0.0,
        normalize_q=operands.k == "float16" and q.dtype == "bfloat16",
        sm_scale=float(call.score_scale),
        causal=bool(call.causal),
        window=min(call.window or 0, _FAR),
        softcap=float(call.softcap or 0.0),
        has_sinks=call.sinks is not None,
        has_alibi=call.alibi_slopes is not None,
        has_cu_seqlens=call.cu_seqlens_q is not None,
        overlap=queries is not None and device.has_pdl,
        programs=shape.programs,
        part_stride=_part_stride(shape.queries * group, layout.head_dim_v),
    )
    return spec, shape


_FAR = 2**30  # a window that hides nothing, and still an int32 when added to a position
_DECODE_ROWS = 64  # more query rows a KV head than this take the prefill kernel
_DECODE_WARPS_PER_SM = 8  # what fits: each thread uses nearly all the 255 registers it can have
_MERGE_PARTS = 16
_MERGE_FEW_PARTS = 4  # of many sequences; 16 at a time are mostly masked then
_MERGE_COLUMNS = 64
# From so many rows Hopper's dots take their right operand from shared memory. Narrow ones (less than 128 bytes) are
# miscompiled by Triton 3.6: it computes negative shared-memory offsets.
_MANY_ROWS = 64
# A float32 dot has no tensor core: it is unrolled into single multiplications, and a wide one compiles for a minute
# and spills registers.
_FLOAT32_ROWS = 16
_FLOAT32_WARPS = 4


def _few_queries(cu_seqlens_q: ArraySpec | None, max_seqlen_q: int | None, group: int) -> int | None:
    """The most queries of a sequence if the keys are to be split over programs, None if the queries are."""
    if cu_seqlens_q is None:
        return 1
    if max_seqlen_q is not None and (max_seqlen_q == 1 or max_seqlen_q * group <= _DECODE_ROWS):
        return max_seqlen_q
    return None


class _Operands(NamedTuple):
    k: str
    v: str


class AttentionShape(NamedTuple):
    """What is chosen for a kernel and a device: the fields of `AttentionSpec` of these names, and launch options."""

    rows: int
    row_blocks: int
    queries: int
    tile: int
    k_parts: int
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


def _decode_shape(
    records: RecordSpec, group: int, queries: int, rows: int, operands: _Operands, device: DeviceFacts
) -> AttentionShape:
    code_bytes = max(records.k.code_bytes, records.v.code_bytes)
    row_blocks = math.ceil(queries * group / rows)
    dim = max(records.k.padded_dim, records.v.padded_dim)
    in_group = _takes_group(records, rows, operands, device)
    num_warps = 4 if in_group else max(_FLOAT32_WARPS if "float32" in operands else 1, min(8, rows * dim // 2048))
    programs = device.num_sms * max(1, _DECODE_WARPS_PER_SM // num_warps)
    return AttentionShape(
        rows=rows,
        row_blocks=row_blocks,
        queries=queries,
        tile=2**14 // dim if in_group else _tile(records, 2**14 * num_warps, 128 if rows == 16 else 64, operands),
        k_parts=2 if in_group else 1,
        num_warps=num_warps,
        num_stages=5 if in_group else 2 if code_bytes == 1 and num_warps == 1 else 3,
        programs=max(1, programs // (records.num_kv_heads * row_blocks)),
    )


def _takes_group(records: RecordSpec, rows: int, operands: _Operands, device: DeviceFacts) -> bool:
    """Whether four warps attend together: 55 us for 32 rows of one KV head where two took 60 (bench log 9).

    Codes of 16 bits would not fit into shared memory twice, and the pairs of a dot of K take 32 columns.
    """
    has_codes = records.k.code_bytes == records.v.code_bytes == 1 and operands == ("float16", "float16")
    fits = records.k.padded_dim >= 32 and 128 <= max(records.k.padded_dim, records.v.padded_dim) <= 256
    return device.has_group_dots and rows == 32 and has_codes and fits


def _prefill_shape(records: RecordSpec, group: int, rows: int, operands: _Operands) -> AttentionShape:
    code_bytes = max(records.k.code_bytes, records.v.code_bytes)
    dim = max(records.k.padded_dim, records.v.padded_dim)
    return AttentionShape(
        rows=rows,
        row_blocks=1,
        queries=rows // group,
        tile=_tile(records, 2**15, 128, operands),
        k_parts=1,
        num_warps=4 if dim <= 128 or (dim <= 256 and code_bytes == 1) else 8,
        num_stages=3 if code_bytes == 2 and dim <= 128 else 2,
        programs=1,
    )


def _fit(shape: AttentionShape, records: RecordSpec, operands: _Operands, device: DeviceFacts) -> AttentionShape:
    """``shape`` with less prefetching and fewer keys a step, until it fits into shared memory."""
    while _shared_bytes(shape, records, operands) > device.shared_bytes and (shape.num_stages, shape.tile) != (1, 16):
        if shape.num_stages > 2 or shape.tile == 16:
            shape = shape._replace(num_stages=shape.num_stages - 1)
        else:
            shape = shape._replace(tile=shape.tile // 2)
    return shape


def _shared_bytes(shape: AttentionShape, records: RecordSpec, operands: _Operands) -> int:
    """An upper bound of what Triton allocates: q, probabilities, prefetched codes, the larger converted operand."""
    sides = (records.k, operands.k), (records.v, operands.v)
    buffers = shape.num_stages - (shape.rows < _MANY_ROWS or shape.num_stages > 2)
    codes = sum(side.padded_dim * side.code_bytes for side, _ in sides)
    converted = max(side.padded_dim * _operand_bytes(operand) for side, operand in sides)
    q = shape.rows * records.k.padded_dim * _operand_bytes(operands.k)
    probabilities = shape.rows * shape.tile * _operand_bytes(operands.v)
    return q + probabilities + shape.tile * (buffers * codes + converted) + 2**11


def _operand_bytes(operand: str) -> int:
    return 4 if operand == "float32" else 2


def _tile(records: RecordSpec, step_bytes: int, most: int, operands: _Operands) -> int:
    """Keys a step: about ``step_bytes`` of K and V, at least the 16 keys that a dot takes."""
    if "float32" in operands:
        return 16
    key_bytes = sum(side.padded_dim * side.code_bytes for side in (records.k, records.v))
    return max(16, min(most, 1 << (step_bytes // key_bytes).bit_length() - 1))


def _part_stride(rows: int, head_dim_v: int) -> int:
    """Rows of values, which are multiples of 16 bytes, and a log-sum-exp for each; padded for the next part's rows."""
    return rows * head_dim_v + math.ceil(rows / 4) * 4


def _plan_decode(
    spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec, shape: AttentionShape
) -> AttentionPlan:
    records = spec.records
    num_segments = page_table.shape[0] + spec.programs
    attend = LaunchPlan(
        kernel="attend_segments",
        grid=(spec.programs * spec.row_blocks * records.num_kv_heads, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=(Output((num_segments, records.num_kv_heads, spec.part_stride), "float32"),),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )
    return AttentionPlan(attend, _plan_merge(spec, q, page_table))


def _plan_merge(spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec) -> LaunchPlan:
    num_seqs, max_pages = page_table.shape
    num_q_tokens, num_q_heads, _ = q.shape
    head_dim_v = spec.records.v.head_dim
    is_wide = head_dim_v > 256  # as latents are: more programs than fit take turns
    columns = 2 * _MERGE_COLUMNS if is_wide else _MERGE_COLUMNS
    few_parts = _MERGE_FEW_PARTS if is_wide else _MERGE_PARTS
    return LaunchPlan(
        kernel="merge_segments",
        grid=(num_q_tokens * num_q_heads * math.ceil(head_dim_v / columns), 1, 1),
        scalars=(num_q_tokens, num_seqs, max_pages),
        outputs=_attention_outputs(q, head_dim_v),
        constexprs=(("S", spec), ("PARTS", _MERGE_PARTS), ("FEW_PARTS", few_parts), ("COLUMNS", columns)),
        num_warps=1,
        enable_fp_fusion=True,
        launch_pdl=spec.overlap,
    )


def plan_prefill(
    spec: AttentionSpec, shape: AttentionShape, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec
) -> LaunchPlan:
    """The launch of ``attend_queries``."""
    num_tiles = math.ceil(q.shape[0] / spec.queries) + page_table.shape[0] + 1
    return LaunchPlan(
        kernel="attend_queries",
        grid=(num_tiles * spec.records.num_kv_heads, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=_attention_outputs(q, spec.records.v.head_dim),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )


def _attend_scalars(spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec) -> tuple[int, ...]:
    num_seqs, max_pages = page_table.shape
    strides = (stride // spec.q_align for stride in q.strides[:2])
    return (q.shape[0], num_seqs, pages.shape[0], max_pages, *strides)


def _attention_outputs(q: ArraySpec, head_dim_v: int) -> tuple[Output, Output]:
    return Output((*q.shape[:2], head_dim_v), q.dtype), Output(q.shape[:2], "float32")


def _power_of_two(n: int, least: int) -> int:
    return max(least, 1 << (n - 1).bit_length())
