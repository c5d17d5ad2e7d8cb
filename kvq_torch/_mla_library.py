"""The custom ops of MLA caches, registered as those of `kvq_torch._library`.

Appending and gathering are the ops of KV caches on ``layout.records``; only attention has kernels of its own.
"""

from __future__ import annotations

import functools

import torch

from kvq_core.arguments import AttentionCall
from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_append_mla, check_gather_mla, check_mla_attention
from kvq_torch._interop import array_keys, array_spec, optional_spec
from kvq_torch._library import _backend, _check_devices, _is_static, _register

_SCHEMAS = {
    "append_mla_": "(Tensor(a!) pages, Tensor k_scale, Tensor kv_c, Tensor k_pe, Tensor slot_mapping, str layout, "
    "str? impl) -> ()",
    "gather_mla": "(Tensor pages, Tensor k_scale, Tensor page_table, Tensor seq_lens, str layout, str? impl) "
    "-> (Tensor, Tensor)",
    "mla_attention": "(Tensor q, Tensor pages, Tensor k_scale, Tensor page_table, Tensor seq_lens, "
    "Tensor? cu_seqlens_q, SymInt? max_seqlen_q, float sm_scale, bool causal, str layout, str? impl) "
    "-> (Tensor, Tensor)",
}

_layout = functools.cache(MLALayout.from_fingerprint)


def _append_mla_(pages, k_scale, kv_c, k_pe, slot_mapping, layout, impl):
    _check_devices(pages, k_scale=k_scale, kv_c=kv_c, k_pe=k_pe, slot_mapping=slot_mapping)
    backend, mla_layout = _backend(impl, pages), _layout(layout)
    check_append_mla(mla_layout, *map(array_spec, (pages, kv_c, k_pe, slot_mapping)))
    rows = kv_c[:, None], k_pe[:, None]
    backend.append_kv_(mla_layout.records, pages, k_scale, k_scale, *rows, slot_mapping)


def _gather_mla(pages, k_scale, page_table, seq_lens, layout, impl):
    _check_devices(pages, k_scale=k_scale, page_table=page_table, seq_lens=seq_lens)
    backend, mla_layout = _backend(impl, pages), _layout(layout)
    check_gather_mla(mla_layout, *map(array_spec, (pages, page_table, seq_lens)))
    sides = backend.gather_kv(mla_layout.records, pages, k_scale, k_scale, page_table, seq_lens, torch.float32)
    return tuple(side.squeeze(2) for side in sides)


def _mla_attention(q, pages, k_scale, page_table, seq_lens, cu_seqlens_q, max_seqlen_q, sm_scale, causal, layout, impl):
    _check_devices(pages, k_scale=k_scale, q=q, page_table=page_table, seq_lens=seq_lens, cu_seqlens_q=cu_seqlens_q)
    keys = array_keys(q, pages, page_table, seq_lens, cu_seqlens_q, None, None)
    call_key = keys, (max_seqlen_q, sm_scale, causal)
    backend = _backend(impl, pages)
    return backend.mla_attention(_layout(layout), call_key, q, pages, k_scale, page_table, seq_lens, cu_seqlens_q)


def _append_mla_fake(pages, k_scale, kv_c, k_pe, slot_mapping, layout, impl):
    _check_devices(pages, k_scale=k_scale, kv_c=kv_c, k_pe=k_pe, slot_mapping=slot_mapping)
    if _is_static(pages, kv_c, k_pe, slot_mapping):
        check_append_mla(_layout(layout), *map(array_spec, (pages, kv_c, k_pe, slot_mapping)))


def _gather_mla_fake(pages, k_scale, page_table, seq_lens, layout, impl):
    _check_devices(pages, k_scale=k_scale, page_table=page_table, seq_lens=seq_lens)
    mla_layout = _layout(layout)
    if _is_static(pages, page_table, seq_lens):
        check_gather_mla(mla_layout, *map(array_spec, (pages, page_table, seq_lens)))
    num_seqs, max_pages = page_table.shape
    size = (num_seqs, max_pages * mla_layout.page_size)
    dims = (mla_layout.kv_lora_rank, mla_layout.rope_dim)
    return tuple(pages.new_empty((*size, dim), dtype=torch.float32) for dim in dims)


def _mla_attention_fake(
    q, pages, k_scale, page_table, seq_lens, cu_seqlens_q, max_seqlen_q, sm_scale, causal, layout, impl
):
    arrays = {"k_scale": k_scale, "q": q, "page_table": page_table, "seq_lens": seq_lens, "cu_seqlens_q": cu_seqlens_q}
    _check_devices(pages, **arrays)
    mla_layout = _layout(layout)
    if _is_static(pages, *arrays.values()) and not isinstance(max_seqlen_q, torch.SymInt):
        call = AttentionCall(
            *map(array_spec, (q, pages, page_table, seq_lens)),
            cu_seqlens_q=optional_spec(cu_seqlens_q),
            max_seqlen_q=max_seqlen_q,
            sm_scale=sm_scale,
            causal=causal,
        )
        check_mla_attention(mla_layout, call)
    num_q_tokens, num_heads, _ = q.shape
    out = q.new_empty((num_q_tokens, num_heads, mla_layout.kv_lora_rank))
    return out, q.new_empty((num_q_tokens, num_heads), dtype=torch.float32)


append_mla_op = _register("append_mla_", _append_mla_, _append_mla_fake, _SCHEMAS["append_mla_"])
gather_mla_op = _register("gather_mla", _gather_mla, _gather_mla_fake, _SCHEMAS["gather_mla"])
mla_attention_op = _register("mla_attention", _mla_attention, _mla_attention_fake, _SCHEMAS["mla_attention"])
