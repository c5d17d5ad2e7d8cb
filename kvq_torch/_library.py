"""The custom ops: schemas, the one implementation behind each, and what a compiler is told of the results.

An op takes plain tensors, and the layout as its fingerprint, so that dynamo, functionalization and export see a schema
and nothing else. Checks and launch plans are made inside the op, where nothing traces them.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import ModuleType

import torch

from kvq_core.arguments import (
    AttentionCall,
    check_append_kv,
    check_copy_pages,
    check_count,
    check_gather_kv,
    check_paged_attention,
)
from kvq_core.layout import CacheLayout
from kvq_torch import _eager
from kvq_torch._interop import array_keys, array_spec, dtype_name, keyed_call, optional_spec

_IMPLS = ("triton", "sdpa", "eager")
_LIBRARY = torch.library.Library("kvq", "DEF")
_SCHEMAS = {
    "append_kv_": "(Tensor(a!) pages, Tensor k_scale, Tensor v_scale, Tensor k, Tensor v, Tensor slot_mapping, "
    "str layout, str? impl) -> ()",
    "gather_kv": "(Tensor pages, Tensor k_scale, Tensor v_scale, Tensor page_table, Tensor seq_lens, "
    "ScalarType dtype, str layout, str? impl) -> (Tensor, Tensor)",
    "copy_pages_": "(Tensor(a!) pages, Tensor src, Tensor dst, str? impl) -> ()",
    "paged_attention": "(Tensor q, Tensor pages, Tensor k_scale, Tensor v_scale, Tensor page_table, Tensor seq_lens, "
    "Tensor? cu_seqlens_q, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float? sm_scale, bool causal, int? window, "
    "float? softcap, Tensor? sinks, Tensor? alibi_slopes, str layout, str? impl) -> (Tensor, Tensor)",
}

_layout = functools.cache(CacheLayout.from_fingerprint)


def _append_kv_(pages, k_scale, v_scale, k, v, slot_mapping, layout, impl):
    # The condition alone takes half the time of the check.
    if not (pages.device == k_scale.device == v_scale.device == k.device == v.device == slot_mapping.device):
        _check_devices(pages, k_scale=k_scale, v_scale=v_scale, k=k, v=v, slot_mapping=slot_mapping)
    _backend(impl, pages).append_kv_(_layout(layout), pages, k_scale, v_scale, k, v, slot_mapping)


def _gather_kv(pages, k_scale, v_scale, page_table, seq_lens, dtype, layout, impl):
    _check_devices(pages, k_scale=k_scale, v_scale=v_scale, page_table=page_table, seq_lens=seq_lens)
    backend = _backend(impl, pages)
    return backend.gather_kv(_layout(layout), pages, k_scale, v_scale, page_table, seq_lens, dtype)


def _copy_pages_(pages, src, dst, impl):
    _check_devices(pages, src=src, dst=dst)
    _backend(impl, pages).copy_pages_(pages, src, dst)


def _paged_attention(
    q,
    pages,
    k_scale,
    v_scale,
    page_table,
    seq_lens,
    cu_seqlens_q,
    max_seqlen_q,
    max_seqlen_k,
    sm_scale,
    causal,
    window,
    softcap,
    sinks,
    alibi_slopes,
    layout,
    impl,
):
    if not (pages.device == q.device == k_scale.device == v_scale.device == page_table.device == seq_lens.device):
        _check_devices(pages, q=q, k_scale=k_scale, v_scale=v_scale, page_table=page_table, seq_lens=seq_lens)
    if not (cu_seqlens_q is None and sinks is None and alibi_slopes is None):
        _check_devices(pages, cu_seqlens_q=cu_seqlens_q, sinks=sinks, alibi_slopes=alibi_slopes)
    check_count("max_seqlen_k", max_seqlen_k)
    cache_layout = _layout(layout)
    keys = array_keys(q, pages, page_table, seq_lens, cu_seqlens_q, sinks, alibi_slopes)
    call_key = keys, (max_seqlen_q, sm_scale, causal, window, softcap)
    arrays = q, pages, k_scale, v_scale, page_table, seq_lens
    if impl == "sdpa" or (impl is None and cu_seqlens_q is not None and not pages.is_cpu):
        _check_triton_runs_on(pages, impl or "triton")
        from kvq_torch import _sdpa

        plan = _sdpa.plan(cache_layout, keyed_call(call_key), max_seqlen_k, pages.device, is_wanted=impl == "sdpa")
        if plan is not None:
            assert cu_seqlens_q is not None  # it needs them
            return _sdpa.paged_attention(plan, *arrays, cu_seqlens_q, sinks)
    backend = _backend(impl, pages)
    return backend.paged_attention(cache_layout, call_key, *arrays, cu_seqlens_q, sinks, alibi_slopes)


def _append_kv_fake(pages, k_scale, v_scale, k, v, slot_mapping, layout, impl):
    _check_devices(pages, k_scale=k_scale, v_scale=v_scale, k=k, v=v, slot_mapping=slot_mapping)
    if _is_static(pages, k, v, slot_mapping):
        check_append_kv(_layout(layout), array_spec(pages), array_spec(k), array_spec(v), array_spec(slot_mapping))


def _gather_kv_fake(pages, k_scale, v_scale, page_table, seq_lens, dtype, layout, impl):
    _check_devices(pages, k_scale=k_scale, v_scale=v_scale, page_table=page_table, seq_lens=seq_lens)
    cache_layout = _layout(layout)
    if _is_static(pages, page_table, seq_lens):
        specs = array_spec(pages), array_spec(page_table), array_spec(seq_lens)
        check_gather_kv(cache_layout, *specs, dtype_name(dtype))
    num_seqs, max_pages = page_table.shape
    size = (num_seqs, max_pages * cache_layout.page_size, pages.shape[cache_layout.head_axis])
    return tuple(pages.new_empty((*size, dim), dtype=dtype) for dim in (cache_layout.head_dim, cache_layout.head_dim_v))


def _copy_pages_fake(pages, src, dst, impl):
    _check_devices(pages, src=src, dst=dst)
    if _is_static(pages, src, dst):
        check_copy_pages(array_spec(pages), array_spec(src), array_spec(dst))


def _paged_attention_fake(
    q,
    pages,
    k_scale,
    v_scale,
    page_table,
    seq_lens,
    cu_seqlens_q,
    max_seqlen_q,
    max_seqlen_k,
    sm_scale,
    causal,
    window,
    softcap,
    sinks,
    alibi_slopes,
    layout,
    impl,
):
    optional = {"cu_seqlens_q": cu_seqlens_q, "sinks": sinks, "alibi_slopes": alibi_slopes}
    required = {"k_scale": k_scale, "v_scale": v_scale, "q": q, "page_table": page_table, "seq_lens": seq_lens}
    _check_devices(pages, **required, **optional)
    cache_layout = _layout(layout)
    if _is_static(pages, *required.values(), *optional.values()) and not isinstance(max_seqlen_q, torch.SymInt):
        call = AttentionCall(
            *map(array_spec, (q, pages, page_table, seq_lens)),
            *map(optional_spec, optional.values()),
            max_seqlen_q=max_seqlen_q,
            sm_scale=sm_scale,
            causal=causal,
            window=window,
            softcap=softcap,
        )
        check_paged_attention(cache_layout, call)
    num_q_tokens, num_q_heads, _ = q.shape
    out = q.new_empty((num_q_tokens, num_q_heads, cache_layout.head_dim_v))
    return out, q.new_empty((num_q_tokens, num_q_heads), dtype=torch.float32)


def _backend(impl: str | None, pages: torch.Tensor) -> ModuleType:
    """The module that implements the ops; an explicit ``impl`` never becomes another."""
    if impl is None:
        impl = "eager" if pages.is_cpu else "triton"
    if impl == "eager":
        return _eager
    if impl == "triton":
        _check_triton_runs_on(pages, impl)
        return _triton()
    if impl == "sdpa":
        raise NotImplementedError("impl='sdpa' is a way to attend; use 'triton', 'eager' or None for the other ops")
    raise ValueError(f"expected impl to be None or one of {_IMPLS}; got {impl!r}")


@functools.cache
def _triton() -> ModuleType:
    """Imported when it is first used, because it needs Triton, and once, because an import takes time every time."""
    from kvq_torch import _triton

    return _triton


def _check_triton_runs_on(pages: torch.Tensor, impl: str) -> None:
    if pages.is_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"impl={impl!r} got tensors on a CPU, where it needs Triton's interpreter. Move them to a GPU, use "
            "impl='eager', or set TRITON_INTERPRET=1 in the environment before Python starts"
        )


def _check_devices(pages: torch.Tensor, **tensors: torch.Tensor | None) -> None:
    device = pages.device
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"expected {name} on the device of the pages, {str(device)!r}; got {str(tensor.device)!r}. "
                f"Pass {name}.to({str(device)!r})"
            )


def _is_static(*tensors: torch.Tensor | None) -> bool:
    """Whether all sizes are known while tracing. The check of a symbolic one would be a guard, hence a recompile."""
    return all(type(n) is int for t in tensors if t is not None for n in (*t.shape, *t.stride()))


def _register(name: str, implementation: Callable, fake: Callable, schema: str) -> torch._ops.OpOverload:
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"kvq::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.kvq, name).default


append_kv_op = _register("append_kv_", _append_kv_, _append_kv_fake, _SCHEMAS["append_kv_"])
gather_kv_op = _register("gather_kv", _gather_kv, _gather_kv_fake, _SCHEMAS["gather_kv"])
copy_pages_op = _register("copy_pages_", _copy_pages_, _copy_pages_fake, _SCHEMAS["copy_pages_"])
paged_attention_op = _register("paged_attention", _paged_attention, _paged_attention_fake, _SCHEMAS["paged_attention"])
