"""Plans of MLA attention: which kernel, how many rows and keys a step, how many programs."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

from kvq_core.arguments import ArraySpec, AttentionCall
from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_mla_attention
from kvq_core.modes import KVQuantMode
from kvq_core.plan.attention import (
    AttentionPlan,
    _attend_scalars,
    _attention_outputs,
    _part_stride,
    _plan_merge,
    _power_of_two,
)
from kvq_core.plan.launch import DeviceFacts, LaunchPlan, Output, cached, pool_spec, stride_align
from kvq_core.specs import AttentionSpec, RecordSpec

_SPLIT_ROWS = 256  # more query rows a sequence than this take a program each; parts of fewer are merged
_WARPS_PER_SM = 8  # what fits: each thread uses most of the 255 registers it can have
# Hopper's dots take 64 rows, 64 columns of an accumulator and 128 bytes of the right operand, see plan.attention.
_MANY_ROWS = 64
_FLOAT32_ROWS = 16
_FLOAT32_WARPS = 4
# kvq_core.kernels.groups: keys of a tile of one consumer, and rows from which consumers share out columns.
_GROUPS_KEYS = 64
_GROUPS_CAPACITY = 2**30  # keys of a sequence: the tiles of 128 are counted in 32 bits
_SHARED_COLUMNS = 32
# In float16 the largest probability is 2^_P_SHIFT, so that small ones are normal. Groups raise maxima late (LAZY
# there), and theirs grow 2^8 times as large, to 2^15.
_P_SHIFT = 14.0
_GROUPS_P_SHIFT = 7.0


@cached
def plan_mla_attention(layout: MLALayout, call: AttentionCall, device: DeviceFacts) -> AttentionPlan | None:
    """Plan `mla_attention`; None if there are no queries.

    ``attend``: (q, pages, k_scale, page_table, seq_lens, cu_seqlens_q or seq_lens) -> (out, lse), or partial results
    for ``merge``: (partial, k_scale, seq_lens, cu_seqlens_q or seq_lens) -> (out, lse).

    Raises:
        ValueError, TypeError: see `kvq_core.mla_arguments.check_mla_attention`.
    """
    check_mla_attention(layout, call)
    q, pages, page_table = call.q, call.pages, call.page_table
    if q.shape[0] == 0:
        return None
    num_heads = q.shape[1]
    queries = _few_queries(call.cu_seqlens_q, call.max_seqlen_q, num_heads)
    operands = _operands(layout, q.dtype, device)
    shape = _shape(layout, queries, num_heads, operands, device)
    records = _record_spec(layout, pages, device, least_dim=64 if shape.rows == _MANY_ROWS else 16)
    if _takes_groups(shape, operands, records, device) and page_table.shape[1] * layout.page_size < _GROUPS_CAPACITY:
        shape = _groups_shape(shape, layout, device)
    else:
        shape = _fit(shape, layout, operands, device)
    spec = AttentionSpec(
        records=records,
        num_q_heads=num_heads,
        group=num_heads,
        rows=shape.rows,
        row_blocks=shape.row_blocks,
        queries=shape.queries,
        tile=shape.tile,
        keys_first=False,
        q_align=stride_align(q),
        k_operand=operands.rope,
        v_operand=operands.latent,
        fold_v_scales=operands.latent != "float32",
        k_parts=1,
        v_parts=shape.parts,
        late_sums=False,
        p_shift=_p_shift(shape, operands),
        normalize_q=operands.latent == "float16" and q.dtype == "bfloat16",
        sm_scale=float(call.score_scale),
        causal=call.causal,
        window=0,
        softcap=0.0,
        has_sinks=False,
        has_alibi=False,
        has_cu_seqlens=call.cu_seqlens_q is not None,
        overlap=queries is not None and device.has_pdl,
        programs=shape.programs,
        part_stride=_part_stride(shape.queries * num_heads, layout.kv_lora_rank),
    )
    if queries is None:
        return _plan_queries(spec, q, page_table, pages, shape)
    return _plan_segments(spec, q, page_table, pages, shape)


class _Operands(NamedTuple):
    latent: str
    rope: str


class _Shape(NamedTuple):
    kernel: str
    rows: int
    row_blocks: int
    queries: int
    parts: int
    tile: int
    num_warps: int
    num_stages: int
    programs: int


def _few_queries(cu_seqlens_q: ArraySpec | None, max_seqlen_q: int | None, num_heads: int) -> int | None:
    """The most queries of a sequence if the keys are to be split over programs, None if the queries are."""
    if cu_seqlens_q is None:
        return 1
    if max_seqlen_q is not None and (max_seqlen_q == 1 or max_seqlen_q * num_heads <= _SPLIT_ROWS):
        return max_seqlen_q
    return None


def _operands(layout: MLALayout, q_dtype: str, device: DeviceFacts) -> _Operands:
    """Operand dtypes of the dots, by the rule of `kvq_core.plan.attention`."""

    def operand(mode: KVQuantMode) -> str:
        if q_dtype == "float32":
            return "float32"
        if mode.bits == 8:
            return "float16"
        return q_dtype if mode.value == q_dtype and device.backend != "interpreter" else "float32"

    return _Operands(operand(layout.mode), operand(layout.rope_mode))


def _shape(layout: MLALayout, queries: int | None, num_heads: int, operands: _Operands, device: DeviceFacts) -> _Shape:
    all_rows = num_heads if queries is None else queries * num_heads
    rows = min(_power_of_two(all_rows, 16), _most_rows(operands, device))
    if queries is None:
        rows = max(rows, _most_rows(operands, device))
    many = rows == _MANY_ROWS
    rank = _power_of_two(layout.kv_lora_rank, 64 if many else 16)
    num_warps = max(4 if many or "float32" in operands else 1, min(8, rows * rank // 2048))
    row_blocks = math.ceil(all_rows / rows)
    programs = device.num_sms * max(1, _WARPS_PER_SM // num_warps)
    return _Shape(
        kernel="attend_mla_queries" if queries is None else "attend_mla_segments",
        rows=rows,
        row_blocks=row_blocks,
        queries=max(1, rows // num_heads) if queries is None else queries,
        parts=1 if many else 2,
        tile=16 if "float32" in operands else 64 if many or layout.mode.bits == 8 else 32,
        num_warps=num_warps,
        num_stages=3 if many and layout.mode.bits == 16 else 5,
        programs=1 if queries is None else max(1, programs // row_blocks),
    )


def _most_rows(operands: _Operands, device: DeviceFacts) -> int:
    """Rows of a program: the 64 of Hopper's dots where they, and the state that they need, exist."""
    if operands.latent == "float32":
        return _FLOAT32_ROWS
    return _MANY_ROWS if device.has_group_dots else 32


def _takes_groups(shape: _Shape, operands: _Operands, records: RecordSpec, device: DeviceFacts) -> bool:
    """Whether `kvq_core.kernels.groups` decodes this: the shapes of DeepSeek's models, in pages of whole tiles."""
    rope, latent = records.k, records.v
    return (
        device.has_task_groups
        and shape.kernel == "attend_mla_segments"
        and shape.queries == 1
        and (latent.code_bytes == 1 or shape.rows == _MANY_ROWS)
        and "float32" not in operands
        and (latent.head_dim, rope.head_dim) == (512, 64)
        and records.page_size % _GROUPS_KEYS == 0
        and math.gcd(latent.align, rope.align) % 16 == 0
        and not (latent.is_wide or rope.is_wide)
    )


def _groups_shape(shape: _Shape, layout: MLALayout, device: DeviceFacts) -> _Shape:
    """One program a multiprocessor, whose two consumers have tiles of their own, or one tile each of S.tile keys."""
    return shape._replace(
        kernel="attend_mla_columns" if layout.mode.bits == 8 else "attend_mla_rows",
        tile=_GROUPS_KEYS if shape.rows < _SHARED_COLUMNS else 2 * _GROUPS_KEYS,
        num_warps=4,
        num_stages=1,
        programs=max(1, device.num_sms // shape.row_blocks),
    )


def _p_shift(shape: _Shape, operands: _Operands) -> float:
    if operands.latent != "float16":
        return 0.0
    return _GROUPS_P_SHIFT if shape.kernel == "attend_mla_columns" else _P_SHIFT


def _fit(shape: _Shape, layout: MLALayout, operands: _Operands, device: DeviceFacts) -> _Shape:
    """``shape`` with less prefetching and fewer keys a step, until it fits into shared memory."""
    while _shared_bytes(shape, layout, operands) > device.shared_bytes and (shape.num_stages, shape.tile) != (1, 16):
        if shape.num_stages > 2 or shape.tile == 16:
            shape = shape._replace(num_stages=shape.num_stages - 1)
        else:
            shape = shape._replace(tile=shape.tile // 2)
    return shape


def _shared_bytes(shape: _Shape, layout: MLALayout, operands: _Operands) -> int:
    """What Triton allocates, give or take a KiB: q, tiles of codes in flight, and tiles of operands.

    The loads of codes wait for those of page ids, so that every tile in flight takes two stages.
    """
    many = shape.rows == _MANY_ROWS
    rank, rope = (_power_of_two(dim, 64 if many else 16) for dim in (layout.kv_lora_rank, layout.rope_dim))
    latent_bytes, rope_bytes = (4 if operand == "float32" else 2 for operand in operands)
    latent_row, rope_row = rank * layout.mode.bits // 8, rope * layout.rope_mode.bits // 8
    in_flight = max(shape.num_stages // 2, min(1, shape.num_stages - 1))
    key = in_flight * (latent_row + rope_row + 8)
    if many and layout.mode.bits == 16:
        key += latent_row + rope_row  # dots read the buffer that was loaded into
    elif many:
        key += rank * latent_bytes + rope * rope_bytes
    elif "float32" in operands:
        key += 2 * rank * latent_bytes
    # The last tiles of a sequence are masked, not in flight; where queries differ in what they see, NaN is cleared.
    is_cleared = shape.queries > 1 and not layout.mode.is_per_token_head
    last_key = 2 * (rank * latent_bytes if is_cleared else latent_row) + rope_row
    q = shape.rows * (rank * latent_bytes + rope * rope_bytes)
    return q + shape.tile * max(key, last_key) + (4608 if many and layout.mode.bits == 16 else 2048)


def _record_spec(layout: MLALayout, pages: ArraySpec, device: DeviceFacts, least_dim: int) -> RecordSpec:
    """The rope part as K, what a key has besides its value, and the latent as V."""
    records = pool_spec(layout.records, pages, device, least_dim)
    return dataclasses.replace(records, k=records.v, v=records.k)


def _plan_segments(
    spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec, shape: _Shape
) -> AttentionPlan:
    num_segments = page_table.shape[0] + spec.programs
    attend = LaunchPlan(
        kernel=shape.kernel,
        grid=(spec.programs * spec.row_blocks, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=(Output((num_segments, 1, spec.part_stride), "float32"),),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )
    return AttentionPlan(attend, _plan_merge(spec, q, page_table))


def _plan_queries(
    spec: AttentionSpec, q: ArraySpec, page_table: ArraySpec, pages: ArraySpec, shape: _Shape
) -> AttentionPlan:
    num_tiles = math.ceil(q.shape[0] / spec.queries) + page_table.shape[0] + 1
    attend = LaunchPlan(
        kernel=shape.kernel,
        grid=(num_tiles * spec.row_blocks, 1, 1),
        scalars=_attend_scalars(spec, q, page_table, pages),
        outputs=_attention_outputs(q, spec.records.v.head_dim),
        constexprs=(("S", spec),),
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        enable_fp_fusion=True,
    )
    return AttentionPlan(attend, None)
