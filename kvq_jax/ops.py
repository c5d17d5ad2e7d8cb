"""The public functions: check the arguments, choose the implementation, return the new cache.

``impl=None`` is ``"triton"`` on a GPU and ``"xla"`` on a CPU. Eagerly the device is that of the pages, under a trace it
is JAX's default backend. An explicit ``impl`` never falls back: it runs, or it raises.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from kvq_core.arguments import (
    AttentionCall,
    check_append_kv,
    check_copy_pages,
    check_count,
    check_gather_kv,
    check_paged_attention,
)
from kvq_core.layout import CacheLayout
from kvq_core.mla_arguments import check_kind
from kvq_jax import _cudnn, _triton, _xla
from kvq_jax._interop import Array, array_spec, as_jax, optional_spec, platform
from kvq_jax.cache import KVCache

IMPLS = ("triton", "cudnn", "pallas", "xla")


def append_kv(cache: KVCache, k: Array, v: Array, slot_mapping: Array, *, impl: str | None = None) -> KVCache:
    """Quantize new tokens, write them to their slots, and return the new cache.

    A slot below 0, or past the pool, drops its token. Of tokens with the same slot one wins whole. Donate the old cache
    to ``jit``, or the pool is copied first.

    Args:
        cache: the cache.
        k: bfloat16, float16 or float32 ``[num_tokens, num_kv_heads, head_dim]``.
        v: the same with ``head_dim_v``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        impl: ``"triton"``, ``"xla"`` (quantized modes on a CPU only), or None for the best.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: ``impl`` does not support this call.
    """
    layout = check_kind(cache.layout, CacheLayout)
    implementation = _implementation(impl, cache)
    k, v, slot_mapping = as_jax("k", k), as_jax("v", v), as_jax("slot_mapping", slot_mapping)
    check_append_kv(layout, array_spec(cache.pages), array_spec(k), array_spec(v), array_spec(slot_mapping))
    return dataclasses.replace(cache, pages=implementation.append_kv(cache, k, v, slot_mapping))


def gather_kv(
    cache: KVCache, page_table: Array, seq_lens: Array, *, dtype: Any = jnp.float32, impl: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Read sequences back as dense values.

    Args:
        cache: the cache.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        dtype: of the result: float32, bfloat16 or float16.
        impl: ``"triton"``, ``"xla"``, or None for the best.

    Returns:
        K ``[num_seqs, max_pages * page_size, num_kv_heads, head_dim]`` and V with ``head_dim_v``: zero at and past each
        length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    layout = check_kind(cache.layout, CacheLayout)
    implementation = _implementation(impl, cache)
    page_table, seq_lens = as_jax("page_table", page_table), as_jax("seq_lens", seq_lens)
    name = jnp.dtype(dtype).name
    check_gather_kv(layout, array_spec(cache.pages), array_spec(page_table), array_spec(seq_lens), name)
    return implementation.gather_kv(cache, page_table, seq_lens, name)


def copy_pages(cache: KVCache, src: Array, dst: Array, *, impl: str | None = None) -> KVCache:
    """Copy page ``src[i]`` to page ``dst[i]`` and return the new cache; all sources are read before any is written.

    A pair with an id outside the pool is skipped.

    Args:
        cache: the cache.
        src: int32 or int64 ``[num_pairs]``.
        dst: int32 or int64 ``[num_pairs]``, unique and disjoint from ``src``.
        impl: ``"triton"``, ``"xla"``, or None for the best.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    implementation = _implementation(impl, cache)
    src, dst = as_jax("src", src), as_jax("dst", dst)
    check_copy_pages(array_spec(cache.pages), array_spec(src), array_spec(dst))
    return dataclasses.replace(cache, pages=implementation.copy_pages(cache.pages, src, dst))


def paged_attention(
    q: Array,
    cache: KVCache,
    page_table: Array,
    seq_lens: Array,
    *,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
    alibi_slopes: Array | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Attend over the cached values: ``softmax(sm_scale * q k^T + mask) v``.

    Query i of a sequence's n queries sits at position ``p = seq_len - n + i`` and sees key j when ``j <= p`` (causal)
    and ``j > p - window``. Its score is ``s = sm_scale * q k_j``, then ``softcap * tanh(s / softcap)``, then
    ``+ slope * (j - p)``. A query that sees a key on a page outside the pool, or past the page table, gets NaN.

    Args:
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_q_heads, head_dim]``.
        cache: the cache.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: the most queries of a sequence; ``num_q_tokens`` if None.
        max_seqlen_k: the KV length to prepare for, ``max_seqlen_q`` if None. Only the time depends on it.
        sm_scale: multiplies the scores; ``head_dim**-0.5`` if None.
        causal: whether a query sees no later key.
        window: how many keys up to its position a query sees; None for all.
        softcap: bounds the scores; None for no bound.
        sinks: float32 ``[num_q_heads]``, logits that join the denominator only.
        alibi_slopes: float32 ``[num_q_heads]``.
        return_lse: also return the log-sum-exp.
        impl: ``"triton"``, ``"xla"``, or ``"cudnn"``: pages are read back into bfloat16 (at most 2 GiB), cuDNN attends,
            and a kernel verifies on the device that the lengths are as assumed, and attends where they are not. It
            takes whole prompts (max_seqlen_k = max_seqlen_q, as many queries in each sequence) of bfloat16 queries,
            causal, no window, softcap, ALiBi or sinks, head_dim = head_dim_v up to 256, without the log-sum-exp. There
            a V row with an infinity or NaN makes all of the output NaN that sees it. None takes it on a GPU since
            Hopper, from 2048 x 2048 queries times keys.

    Returns:
        Values ``[num_q_tokens, num_q_heads, head_dim_v]`` in q's dtype, and with ``return_lse`` the log-sum-exp
        ``[num_q_tokens, num_q_heads]``, float32 (natural, sinks included). Queries that see no key: zeros, -inf (or the
        sink). Rows from ``cu_seqlens_q[-1]`` on: zeros, -inf.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: ``impl="cudnn"`` for a call that it does not take; ``impl="pallas"``.
    """
    layout = check_kind(cache.layout, CacheLayout)
    implementation = _implementation("triton" if impl == "cudnn" else impl, cache)
    q, page_table, seq_lens = as_jax("q", q), as_jax("page_table", page_table), as_jax("seq_lens", seq_lens)
    optional = {"cu_seqlens_q": cu_seqlens_q, "sinks": sinks, "alibi_slopes": alibi_slopes}
    cu_seqlens_q, sinks, alibi_slopes = (None if x is None else as_jax(name, x) for name, x in optional.items())
    call = AttentionCall(
        *map(array_spec, (q, cache.pages, page_table, seq_lens)),
        *map(optional_spec, (cu_seqlens_q, sinks, alibi_slopes)),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
        window=window,
        softcap=softcap,
    )
    check_paged_attention(layout, call)
    check_count("max_seqlen_k", max_seqlen_k)
    arrays = q, cache, page_table, seq_lens, cu_seqlens_q
    if impl == "cudnn" or (impl is None and implementation is _triton and cu_seqlens_q is not None):
        is_wanted = impl == "cudnn"
        out = _cudnn.paged_attention(call, max_seqlen_k, *arrays, is_wanted=is_wanted, return_lse=return_lse)
        if out is not None:
            return out
    out, lse = implementation.paged_attention(call, *arrays, sinks, alibi_slopes)
    return (out, lse) if return_lse else out


def _implementation(impl: str | None, cache: KVCache) -> ModuleType:
    """The module that runs a call on ``cache``."""
    if impl is None:
        return _triton if platform(cache.pages) == "gpu" else _xla
    if impl not in IMPLS:
        raise ValueError(f"expected impl to be None or one of {IMPLS}; got {impl!r}")
    if impl == "cudnn":
        raise NotImplementedError("impl='cudnn' is a way to attend; use 'triton', 'xla' or None for the other ops")
    if impl == "pallas":
        raise NotImplementedError("impl='pallas' is not supported yet; use 'triton' on a GPU, 'xla' on a CPU, or None")
    return _triton if impl == "triton" else _xla
