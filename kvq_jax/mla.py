"""The public functions of MLA caches: `KVCache` with a `kvq_core.MLALayout`."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from kvq_core.arguments import AttentionCall
from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_append_mla, check_gather_mla, check_kind, check_mla_attention
from kvq_jax._interop import Array, array_spec, as_jax, optional_spec
from kvq_jax.cache import KVCache, as_records
from kvq_jax.ops import _implementation


def append_mla(cache: KVCache, kv_c: Array, k_pe: Array, slot_mapping: Array, *, impl: str | None = None) -> KVCache:
    """Quantize new tokens, write them to their slots of an MLA cache, and return the new cache.

    A slot below 0, or past the pool, drops its token. Of tokens with the same slot one wins whole. Donate the old cache
    to ``jit``, or the pool is copied first.

    Args:
        cache: the cache; in mode ``fp8_e4m3``, ``k_scale`` is the scale of both parts.
        kv_c: the latents, bfloat16, float16 or float32 ``[num_tokens, kv_lora_rank]``.
        k_pe: the rope parts, the same with ``rope_dim``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        impl: ``"triton"``, ``"xla"`` (quantized modes on a CPU only), or None for the best.

    Raises:
        TypeError, ValueError: an argument is not as above.
        NotImplementedError: ``impl`` does not support this call.
    """
    layout = check_kind(cache.layout, MLALayout)
    implementation = _implementation(impl, cache)
    kv_c, k_pe, slot_mapping = as_jax("kv_c", kv_c), as_jax("k_pe", k_pe), as_jax("slot_mapping", slot_mapping)
    check_append_mla(layout, *(array_spec(x) for x in (cache.pages, kv_c, k_pe, slot_mapping)))
    pages = implementation.append_kv(as_records(cache), kv_c[:, None], k_pe[:, None], slot_mapping)
    return dataclasses.replace(cache, pages=pages)


def gather_mla(
    cache: KVCache, page_table: Array, seq_lens: Array, *, impl: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Read sequences of an MLA cache back as dense values.

    Args:
        cache: the cache.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        impl: ``"triton"``, ``"xla"``, or None for the best.

    Returns:
        Latents ``[num_seqs, max_pages * page_size, kv_lora_rank]`` and rope parts with ``rope_dim``, float32: zero at
        and past each length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    layout = check_kind(cache.layout, MLALayout)
    implementation = _implementation(impl, cache)
    page_table, seq_lens = as_jax("page_table", page_table), as_jax("seq_lens", seq_lens)
    check_gather_mla(layout, *(array_spec(x) for x in (cache.pages, page_table, seq_lens)))
    latent, rope = implementation.gather_kv(as_records(cache), page_table, seq_lens, "float32")
    return latent[:, :, 0], rope[:, :, 0]


def mla_attention(
    q: Array,
    cache: KVCache,
    page_table: Array,
    seq_lens: Array,
    *,
    sm_scale: float,
    cu_seqlens_q: Array | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    impl: str | None = None,
) -> Any:
    """Attend over the cached latents: ``softmax(sm_scale * q [latent | rope]^T + mask) latent``.

    Query i of a sequence's n queries sits at position ``p = seq_len - n + i`` and sees key j when ``j <= p`` (causal).
    A query that sees a key on a page outside the pool, or past the page table, gets NaN.

    Args:
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_heads, kv_lora_rank + rope_dim]``.
        cache: the MLA cache.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        sm_scale: multiplies the scores; it follows from the head size of the model before its latents.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: the most queries of a sequence; ``num_q_tokens`` if None.
        causal: whether a query sees no later key.
        return_lse: also return the log-sum-exp.
        impl: ``"triton"``, ``"xla"``, or None for the best.

    Returns:
        Values ``[num_q_tokens, num_heads, kv_lora_rank]`` in q's dtype, and with ``return_lse`` the log-sum-exp
        ``[num_q_tokens, num_heads]``, float32 (natural). Queries that see no key, and rows from ``cu_seqlens_q[-1]``
        on: zeros, -inf.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    layout = check_kind(cache.layout, MLALayout)
    implementation = _implementation(impl, cache)
    q, page_table, seq_lens = as_jax("q", q), as_jax("page_table", page_table), as_jax("seq_lens", seq_lens)
    cu_seqlens_q = None if cu_seqlens_q is None else as_jax("cu_seqlens_q", cu_seqlens_q)
    call = AttentionCall(
        *map(array_spec, (q, cache.pages, page_table, seq_lens)),
        cu_seqlens_q=optional_spec(cu_seqlens_q),
        max_seqlen_q=max_seqlen_q,
        sm_scale=sm_scale,
        causal=causal,
    )
    check_mla_attention(layout, call)
    out, lse = implementation.mla_attention(call, q, cache, page_table, seq_lens, cu_seqlens_q)
    return (out, lse) if return_lse else out
