"""Prefill through PyTorch's cuDNN attention, on K and V read back from the pages. See `kvq_core.plan.library`."""

from __future__ import annotations

import torch

from kvq_core.arguments import AttentionCall
from kvq_core.layout import CacheLayout
from kvq_core.plan import LibraryPlan, library_is_faster, plan_library_attention
from kvq_torch._interop import device_facts
from kvq_torch._triton import launch


def plan(
    layout: CacheLayout, call: AttentionCall, max_seqlen_k: int | None, where: torch.device, *, is_wanted: bool
) -> LibraryPlan | None:
    """How to prefill through the library; None if it cannot be, or would be slower.

    Raises:
        NotImplementedError: ``is_wanted``, and the library cannot do it.
    """
    device = device_facts(where)
    if not is_wanted and not library_is_faster(call, max_seqlen_k, device):
        return None
    made = plan_library_attention(layout, call, max_seqlen_k, device)
    if isinstance(made, LibraryPlan):
        return made
    if is_wanted:
        raise NotImplementedError(f"impl='sdpa': {made}. Use impl='triton', or None for the best of both")
    return None


def paged_attention(
    made: LibraryPlan,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.paged_attention`; always returns out and lse."""
    k, v = launch(made.gather, pages, k_scale, v_scale, page_table, seq_lens)
    dense_q = (q if _suits_cudnn(q) else q.clone(memory_format=torch.contiguous_format)).unflatten(
        0, (-1, made.num_queries)
    )
    num_before = made.num_keys - made.num_queries
    last = dense_attention(dense_q, k[:, num_before:], v[:, num_before:], is_causal=True, scale=made.sm_scale)
    before = last
    if num_before:
        before = dense_attention(dense_q, k[:, :num_before], v[:, :num_before], is_causal=False, scale=made.sm_scale)
    sinks = k_scale if sinks is None else sinks
    inputs = q, pages, k_scale, v_scale, sinks, k_scale, page_table, seq_lens, cu_seqlens_q
    out, lse = launch(made.finish, *inputs, *last, *before)
    return out.view(*q.shape[:2], -1), lse


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, is_causal: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """cuDNN's attention of ``[num_seqs, length, num_heads, head_dim]``; its lse is ``[num_seqs, num_heads, length]``.

    The op behind `torch.nn.functional.scaled_dot_product_attention`, which keeps the log-sum-exp to itself.
    """
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, is_causal, False, scale=scale
    )
    return out.transpose(1, 2).contiguous(), lse


def _suits_cudnn(q: torch.Tensor) -> bool:
    """Whether all rows start at multiples of 16 bytes."""
    return q.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in q.stride()[:2])
