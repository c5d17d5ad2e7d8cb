"""Plans of the ops that move rows and pages."""

from __future__ import annotations

import math
from typing import NamedTuple

from kvq_core import arguments
from kvq_core.arguments import ArraySpec, axis_stride
from kvq_core.layout import CacheLayout
from kvq_core.plan.launch import DeviceFacts, LaunchPlan, Output, cached, pool_spec, stride_align
from kvq_core.specs import AppendSpec, CopySpec, GatherSpec

# Rows a program quantizes, and the most tokens whose duplicate slots one comparison [rows, tokens] can find.
_APPEND_ROWS = 16
_APPEND_SCAN = 256
_CLAIM_TOKENS = 256
_GATHER_TILE = 32
_COPY_WORDS = 4096


class AppendPlan(NamedTuple):
    """The one or two launches of an append.

    ``claim``, for calls of many tokens: (slot_mapping) -> (winners). ``append``: (k, v, slot_mapping, winners or
    slot_mapping, k_scale, v_scale, pages) -> (pages).
    """

    claim: LaunchPlan | None
    append: LaunchPlan


@cached
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
    k_align, v_align = stride_align(k), stride_align(v)
    spec = AppendSpec(pool_spec(layout, pages, device), _APPEND_ROWS, k_align, v_align, _APPEND_SCAN)
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


@cached
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
    return plan_gather(layout, pages, page_table, page_table.shape[1] * layout.page_size, dtype, device)


def plan_gather(
    layout: CacheLayout,
    pages: ArraySpec,
    page_table: ArraySpec,
    num_tokens: int,
    dtype: str,
    device: DeviceFacts,
    for_attention: bool = False,
) -> LaunchPlan | None:
    """The launch of ``gather_kv`` for the first ``num_tokens`` tokens of each sequence; None if that is nothing."""
    num_seqs, max_pages = page_table.shape
    num_heads = pages.shape[layout.head_axis]
    if num_seqs * num_tokens == 0:
        return None
    spec = GatherSpec(pool_spec(layout, pages, device), _GATHER_TILE, dtype, for_attention)
    return LaunchPlan(
        kernel="gather_kv",
        grid=(num_seqs * num_heads * math.ceil(num_tokens / spec.tile), 1, 1),
        scalars=(pages.shape[0], max_pages, num_tokens),
        outputs=tuple(
            Output((num_seqs, num_tokens, num_heads, dim), dtype) for dim in (layout.head_dim, layout.head_dim_v)
        ),
        constexprs=(("S", spec),),
        num_warps=4,
    )


@cached
def plan_copy_pages(pages: ArraySpec, src: ArraySpec, dst: ArraySpec, device: DeviceFacts) -> LaunchPlan | None:
    """Plan `copy_pages`: (src, dst, pages) -> (pages); None if there is nothing to copy.

    Raises:
        ValueError, TypeError: see `kvq_core.arguments.check_copy_pages`.
    """
    del device  # one plan serves all
    arguments.check_copy_pages(pages, src, dst)
    (num_pairs,) = src.shape
    if 0 in (num_pairs, pages.shape[0]):
        return None
    spec = _copy_spec(pages)
    return LaunchPlan(
        kernel="copy_pages",
        grid=(num_pairs * math.ceil(spec.page_words / spec.chunk), 1, 1),
        scalars=(num_pairs, pages.shape[0]),
        outputs=(Output(pages.shape, "uint8", alias=2),),
        constexprs=(("S", spec),),
        num_warps=4,
    )


def _copy_spec(pages: ArraySpec) -> CopySpec:
    """A page is one run if it is dense, in whatever order of its axes; else every row of its container is one."""
    page_bytes = math.prod(pages.shape[1:])
    span = 1 + sum((size - 1) * stride for size, stride in zip(pages.shape[1:], pages.strides[1:], strict=True))
    if span == page_bytes:
        inner_runs, run_bytes, inner_stride, outer_stride = 1, page_bytes, 0, 0
    else:
        (inner_runs, run_bytes), (outer_stride, inner_stride, _) = pages.shape[2:], pages.strides[1:]
    return CopySpec(
        page_words=page_bytes // 4,
        page_stride=axis_stride(pages, 0) // 4,
        run_words=run_bytes // 4,
        inner_runs=inner_runs,
        inner_stride=inner_stride // 4,
        outer_stride=outer_stride // 4,
        chunk=_COPY_WORDS,
    )
