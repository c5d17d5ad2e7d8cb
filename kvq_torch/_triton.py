"""Runs launch plans of `kvq_core.plan` on torch tensors. It decides nothing; the plans do."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kvq_core import kernels
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.plan import (
    LaunchPlan,
    plan_append_kv,
    plan_copy_pages,
    plan_gather_kv,
    plan_mla_attention,
    plan_paged_attention,
)
from kvq_torch._interop import array_spec, device_facts, dtype_name, optional_spec, torch_dtype


def append_kv_(
    layout: CacheLayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """See `kvq_torch.append_kv_`."""
    specs = array_spec(pages), array_spec(k), array_spec(v), array_spec(slot_mapping)
    plan = plan_append_kv(layout, *specs, device_facts(pages.device))
    if plan is None:
        return
    winners = slot_mapping if plan.claim is None else _launch(plan.claim, slot_mapping)[0]
    _launch(plan.append, k, v, slot_mapping, winners, k_scale, v_scale, pages)


def gather_kv(
    layout: CacheLayout,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.gather_kv`."""
    specs = array_spec(pages), array_spec(page_table), array_spec(seq_lens)
    plan = plan_gather_kv(layout, *specs, dtype_name(dtype), device_facts(pages.device))
    if plan is None:
        size = (page_table.shape[0], page_table.shape[1] * layout.page_size, pages.shape[1])
        return tuple(pages.new_zeros((*size, dim), dtype=dtype) for dim in (layout.head_dim, layout.head_dim_v))
    return _launch(plan, pages, k_scale, v_scale, page_table, seq_lens)


def copy_pages_(pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """See `kvq_torch.copy_pages_`."""
    plan = plan_copy_pages(array_spec(pages), array_spec(src), array_spec(dst), device_facts(pages.device))
    if plan is not None:
        _launch(plan, src, dst, pages)


def paged_attention(
    layout: CacheLayout,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    sm_scale: float | None,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.paged_attention`; always returns out and lse."""
    plan = plan_paged_attention(
        layout,
        array_spec(q),
        array_spec(pages),
        array_spec(page_table),
        array_spec(seq_lens),
        cu_seqlens_q=optional_spec(cu_seqlens_q),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=optional_spec(sinks),
        alibi_slopes=optional_spec(alibi_slopes),
        device=device_facts(q.device),
    )
    if plan is None:
        out = q.new_zeros((*q.shape[:2], layout.head_dim_v))
        return out, q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    # A kernel takes every operand; the plan's constexprs say which of them it reads.
    sinks = k_scale if sinks is None else sinks
    alibi_slopes = k_scale if alibi_slopes is None else alibi_slopes
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    results = _launch(plan.attend, q, pages, k_scale, v_scale, sinks, alibi_slopes, page_table, seq_lens, cu_seqlens_q)
    if plan.merge is None:
        return results
    return _launch(plan.merge, *results, sinks, seq_lens, cu_seqlens_q)


def mla_attention(
    layout: MLALayout,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None,
    max_seqlen_q: int | None,
    sm_scale: float,
    causal: bool,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.mla_attention`; always returns out and lse."""
    plan = plan_mla_attention(
        layout,
        array_spec(q),
        array_spec(pages),
        array_spec(page_table),
        array_spec(seq_lens),
        cu_seqlens_q=optional_spec(cu_seqlens_q),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
        device=device_facts(q.device),
    )
    if plan is None:
        out = q.new_zeros((*q.shape[:2], layout.kv_lora_rank))
        return out, q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    results = _launch(plan.attend, q, pages, k_scale, page_table, seq_lens, cu_seqlens_q)
    if plan.merge is None:
        return results
    return _launch(plan.merge, *results, k_scale, seq_lens, cu_seqlens_q)


def _launch(plan: LaunchPlan, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run the kernel of ``plan`` and return its outputs; those with an alias are the input they were written to."""
    device = inputs[0].device
    with _launching_on(device):
        outputs = tuple(
            torch.empty(output.shape, dtype=torch_dtype(output.dtype), device=device)
            if output.alias is None
            else inputs[output.alias]
            for output in plan.outputs
        )
        operands = (*inputs, *plan.scalars, *outputs)
        runners = _RUNNERS.get(plan)
        if runners is None or device not in runners or not _are_aligned(inputs):
            compiled = _compile_and_launch(plan, operands)
            if device.type != "cpu" and _are_aligned(inputs):
                _RUNNERS.setdefault(plan, {})[device] = compiled[plan.grid], tuple(dict(plan.constexprs).values())
        else:
            run, constexprs = runners[device]
            run(*operands, *constexprs)
    return outputs


# Compiled kernels by plan and device. Triton finds them by itself, but takes 30 us and more to do so.
_RUNNERS: weakref.WeakKeyDictionary[LaunchPlan, dict[torch.device, tuple[Callable, tuple]]] = (
    weakref.WeakKeyDictionary()
)


def _are_aligned(tensors: tuple[torch.Tensor, ...]) -> bool:
    """Whether all start at multiples of 16 bytes: Triton compiles another kernel for those that do not."""
    return all(tensor.data_ptr() % 16 == 0 for tensor in tensors)


def _compile_and_launch(plan: LaunchPlan, operands: tuple) -> Any:
    return getattr(kernels, plan.kernel)[plan.grid](
        *operands,
        **dict(plan.constexprs),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        enable_fp_fusion=plan.enable_fp_fusion,
    )


def _launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, not on that of its tensors.

    On a CPU its interpreter computes in numpy, which warns of infinities that are meant.
    """
    if device.type == "cpu":
        return np.errstate(all="ignore")
    if device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)
