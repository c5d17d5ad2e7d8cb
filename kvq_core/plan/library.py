"""Plans of prefill through the dense attention of a framework's library, on values read back from the pages.

Nothing on the host knows the lengths, so a plan assumes them: every sequence has ``num_queries`` queries and
``num_keys`` keys. The last launch verifies that on the device, sequence by sequence, and attends to any other itself.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from kvq_core import arguments
from kvq_core.arguments import AttentionCall
from kvq_core.layout import CacheLayout
from kvq_core.plan.attention import plan_prefill, specify_attention
from kvq_core.plan.cache import plan_gather
from kvq_core.plan.launch import DeviceFacts, LaunchPlan, Output, cached

_WORKSPACE_BYTES = 2**31  # the most that K and V may take when read back
_MAX_HEAD_DIM = 256  # of cuDNN on Hopper
# Below this the kernel on pages is as fast: 137 us for 2048 queries, where cuDNN's 99 and 15 around it are no less.
_LEAST_QUERIES = 256
_LEAST_PAIRS = 2048 * 2048  # queries times keys


class LibraryPlan(NamedTuple):
    """What runs around the library's dense attention.

    ``gather``: (pages, k_scale, v_scale, page_table, seq_lens) -> (k, v) ``[num_seqs, num_keys, num_kv_heads, dim]``.
    The library attends with q ``[num_seqs, num_queries, num_q_heads, head_dim]`` over the last ``num_queries`` keys,
    causally, and over those before them, if there are any. ``finish``: (the inputs of
    `kvq_core.plan.AttentionPlan.attend`, then out and lse of the first, out and lse of the second or the first again)
    -> (out, lse).
    """

    num_queries: int
    num_keys: int
    sm_scale: float
    gather: LaunchPlan
    finish: LaunchPlan


def library_is_faster(call: AttentionCall, max_seqlen_k: int | None, device: DeviceFacts) -> bool:
    """Whether a library is to be asked, if `plan_library_attention` lets it."""
    num_queries, num_keys = _assumed_lengths(call, max_seqlen_k)
    return device.has_pdl and num_queries >= _LEAST_QUERIES and num_queries * num_keys >= _LEAST_PAIRS


@cached
def plan_library_attention(
    layout: CacheLayout, call: AttentionCall, max_seqlen_k: int | None, device: DeviceFacts
) -> LibraryPlan | str:
    """Plan `paged_attention` through a library, or say what it would need: "expected ...; got ...".

    Raises:
        ValueError, TypeError: see `kvq_core.arguments.check_paged_attention`.
    """
    arguments.check_paged_attention(layout, call)
    num_queries, num_keys = _assumed_lengths(call, max_seqlen_k)
    unmet = _unmet_need(layout, call, num_queries, num_keys)
    if unmet is not None:
        return unmet
    spec, shape = specify_attention(layout, call, device, queries=None)
    attend = plan_prefill(spec, shape, call.q, call.page_table, call.pages)
    out, lse = attend.outputs
    finish = dataclasses.replace(
        attend,
        kernel="finish_queries",
        scalars=(*attend.scalars, num_queries, num_keys),
        outputs=(Output(out.shape, out.dtype, alias=9), lse),
        constexprs=(*attend.constexprs, ("HAS_PREFIX", num_keys > num_queries)),
    )
    gather = plan_gather(layout, call.pages, call.page_table, num_keys, "bfloat16", device, for_attention=True)
    assert gather is not None  # there are sequences and keys
    return LibraryPlan(num_queries, num_keys, spec.sm_scale, gather, finish)


def _assumed_lengths(call: AttentionCall, max_seqlen_k: int | None) -> tuple[int, int]:
    num_queries = call.max_seqlen_q or call.q.shape[0]
    return num_queries, max_seqlen_k or num_queries


def _unmet_need(layout: CacheLayout, call: AttentionCall, num_queries: int, num_keys: int) -> str | None:
    """The first thing that a library would need: "expected ...; got ..."."""
    q, num_kv_heads, (num_seqs, max_pages) = call.q, call.pages.shape[layout.head_axis], call.page_table.shape
    workspace = 2 * num_seqs * num_keys * num_kv_heads * (layout.head_dim + layout.head_dim_v)
    needs = (
        (q.dtype == "bfloat16", "bfloat16 queries", q.dtype),
        (call.cu_seqlens_q is not None, "cu_seqlens_q", None),
        (
            num_seqs * num_queries == q.shape[0] > 0,
            "as many queries in every sequence: num_q_tokens = num_seqs * max_seqlen_q",
            f"{q.shape[0]} != {num_seqs} * {num_queries}",
        ),
        (
            num_queries <= num_keys <= max_pages * layout.page_size,
            "max_seqlen_k from max_seqlen_q to the capacity of the page table",
            f"{num_keys} outside {num_queries}..{max_pages * layout.page_size}",
        ),
        (call.causal, "causal=True", call.causal),
        (call.window is None, "window=None", call.window),
        (call.softcap is None, "softcap=None", call.softcap),
        (call.alibi_slopes is None, "alibi_slopes=None", "slopes"),
        (
            layout.head_dim == layout.head_dim_v <= _MAX_HEAD_DIM,
            f"head_dim = head_dim_v up to {_MAX_HEAD_DIM}",
            f"{layout.head_dim} and {layout.head_dim_v}",
        ),
        (workspace <= _WORKSPACE_BYTES, f"at most {_WORKSPACE_BYTES} bytes of K and V", workspace),
    )
    for is_met, expected, got in needs:
        if not is_met:
            return f"expected {expected}; got {got}"
    return None
