"""Runs launch plans of `kvq_core.plan` on torch tensors. It decides nothing; the plans do."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import torch
from triton import knobs
from triton.runtime import driver

from kvq_core import kernels
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.plan import (
    AppendPlan,
    AttentionPlan,
    LaunchPlan,
    Output,
    plan_append_kv,
    plan_copy_pages,
    plan_gather_kv,
    plan_mla_attention,
    plan_paged_attention,
)
from kvq_core.plan.launch import cached
from kvq_torch._interop import (
    ArrayKeys,
    CallKey,
    array_keys,
    device_facts,
    dtype_name,
    keyed_call,
    keyed_specs,
    torch_dtype,
)


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
    launchers = _append_launchers(layout, array_keys(pages, k, v, slot_mapping), pages.device)
    if launchers is None:
        return
    claim, append = launchers
    winners = slot_mapping if claim is None else claim(slot_mapping)[0]
    append(k, v, slot_mapping, winners, k_scale, v_scale, pages)


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
    gather = _gather_launcher(layout, array_keys(pages, page_table, seq_lens), dtype, pages.device)
    if gather is None:
        size = (page_table.shape[0], page_table.shape[1] * layout.page_size, pages.shape[layout.head_axis])
        return tuple(pages.new_zeros((*size, dim), dtype=dtype) for dim in (layout.head_dim, layout.head_dim_v))
    return gather(pages, k_scale, v_scale, page_table, seq_lens)


def copy_pages_(pages: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> None:
    """See `kvq_torch.copy_pages_`."""
    copy = _copy_launcher(array_keys(pages, src, dst), pages.device)
    if copy is not None:
        copy(src, dst, pages)


def paged_attention(
    layout: CacheLayout,
    call_key: CallKey,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    sinks: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.paged_attention`; always returns out and lse."""
    launchers = _attention_launchers(layout, call_key, q.device)
    if launchers is None:
        out = q.new_zeros((*q.shape[:2], layout.head_dim_v))
        return out, q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    # A kernel takes every operand; the plan's constexprs say which of them it reads.
    sinks = k_scale if sinks is None else sinks
    alibi_slopes = k_scale if alibi_slopes is None else alibi_slopes
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    attend, merge = launchers
    pages = _readable(pages)
    results = attend(q, pages, k_scale, v_scale, sinks, alibi_slopes, page_table, seq_lens, cu_seqlens_q)
    return results if merge is None else merge(*results, sinks, seq_lens, cu_seqlens_q)


def mla_attention(
    layout: MLALayout,
    call_key: CallKey,
    q: torch.Tensor,
    pages: torch.Tensor,
    k_scale: torch.Tensor,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """See `kvq_torch.mla_attention`; always returns out and lse."""
    launchers = _mla_launchers(layout, call_key, q.device)
    if launchers is None:
        out = q.new_zeros((*q.shape[:2], layout.kv_lora_rank))
        return out, q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    attend, merge = launchers
    results = attend(q, _readable(pages), k_scale, page_table, seq_lens, cu_seqlens_q)
    return results if merge is None else merge(*results, k_scale, seq_lens, cu_seqlens_q)


def launch(plan: LaunchPlan, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Run the kernel of ``plan`` and return its outputs; those with an alias are the input they were written to."""
    return _launcher(plan, inputs[0].device)(*inputs)


@cached
def _append_launchers(
    layout: CacheLayout, keys: ArrayKeys, device: torch.device
) -> tuple[_Launcher | None, _Launcher] | None:
    return _launchers(plan_append_kv(layout, *keyed_specs(keys), device_facts(device)), device)


@cached
def _gather_launcher(
    layout: CacheLayout, keys: ArrayKeys, dtype: torch.dtype, device: torch.device
) -> _Launcher | None:
    plan = plan_gather_kv(layout, *keyed_specs(keys), dtype_name(dtype), device_facts(device))
    return None if plan is None else _launcher(plan, device)


@cached
def _copy_launcher(keys: ArrayKeys, device: torch.device) -> _Launcher | None:
    plan = plan_copy_pages(*keyed_specs(keys), device_facts(device))
    return None if plan is None else _launcher(plan, device)


@cached
def _attention_launchers(
    layout: CacheLayout, call_key: CallKey, device: torch.device
) -> tuple[_Launcher, _Launcher | None] | None:
    return _launchers(plan_paged_attention(layout, keyed_call(call_key), device_facts(device)), device)


@cached
def _mla_launchers(
    layout: MLALayout, call_key: CallKey, device: torch.device
) -> tuple[_Launcher, _Launcher | None] | None:
    return _launchers(plan_mla_attention(layout, keyed_call(call_key), device_facts(device)), device)


def _readable(pages: torch.Tensor) -> torch.Tensor:
    """``pages``; of a pool that has none, one, because kernels read page 0 for an id outside the pool."""
    return pages if pages.shape[0] else pages.new_empty_strided((1, *pages.shape[1:]), pages.stride()).zero_()


def _launchers(plan: AppendPlan | AttentionPlan | None, device: torch.device) -> Any:
    """A launcher in the place of each launch of ``plan``."""
    return None if plan is None else tuple(None if part is None else _launcher(part, device) for part in plan)


@cached
def _launcher(plan: LaunchPlan, device: torch.device) -> _Launcher:
    return _Launcher(plan, device)


class _Launcher:
    """Runs a plan on a device and keeps what no call changes: the host takes longer than a decode step of few tokens.

    Triton finds a compiled kernel by itself, but takes 30 us and more to do so, and asks the driver about every tensor.
    """

    def __init__(self, plan: LaunchPlan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._outputs = [
            _prototype(output, device) if output.alias is None else output.alias for output in plan.outputs
        ]
        self._constexprs = [value for _, value in plan.constexprs]
        self._compiled: Any = None  # for operands that are multiples of 16 bytes: others take another kernel

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        index = self._device.index
        if index is not None and index == torch.cuda.current_device():
            return self._launch(inputs)
        with _launching_on(self._device):
            return self._launch(inputs)

    def _launch(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        plan, compiled = self._plan, self._compiled
        # Lists, because generators are slow.
        new_or_alias = [inputs[like] if isinstance(like, int) else torch.empty_like(like) for like in self._outputs]
        outputs = tuple(new_or_alias)
        addresses = [tensor.data_ptr() for tensor in inputs]
        is_aligned = math.gcd(16, *addresses) == 16
        if compiled is None or not is_aligned or _has_launch_hooks():
            compiled = _compile_and_launch(plan, (*inputs, *plan.scalars, *outputs))
            self._compiled = compiled if is_aligned else self._compiled
        else:  # what compiled[plan.grid](...) does with tensors, where nobody listens to launches
            compiled.run(
                *plan.grid,
                driver.active.get_current_stream(self._device.index),  # pyright: ignore[reportAttributeAccessIssue]
                compiled.function,
                compiled.packed_metadata,
                *_NO_HOOKS,
                *addresses,
                *plan.scalars,
                *[tensor.data_ptr() for tensor in outputs],
                *self._constexprs,
            )
        return outputs


_NO_HOOKS = (None, None, None)  # what hooks are told, before and after a launch


def _prototype(output: Output, device: torch.device) -> torch.Tensor:
    """What a new buffer is like, in the memory of one element: torch.empty_like takes half the time of torch.empty."""
    element = torch.empty((1,) * len(output.shape), dtype=torch_dtype(output.dtype), device=device)
    return element.expand(output.shape)


def _has_launch_hooks() -> bool:
    """Whether a profiler wants to know of launches."""
    return bool(knobs.runtime.launch_enter_hook.calls or knobs.runtime.launch_exit_hook.calls)


def _compile_and_launch(plan: LaunchPlan, operands: tuple) -> Any:
    return getattr(kernels, plan.kernel)[plan.grid](
        *operands,
        **dict(plan.constexprs),
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        enable_fp_fusion=plan.enable_fp_fusion,
        **({"launch_pdl": True} if plan.launch_pdl else {}),  # other than NVIDIA's backends do not know it
    )


def _launching_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, not on that of its tensors.

    On a CPU its interpreter computes in numpy, which warns of infinities that are meant.
    """
    if device.type == "cpu":
        return np.errstate(all="ignore")
    return torch.cuda.device(device)
