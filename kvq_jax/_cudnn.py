"""Prefill through JAX's cuDNN attention, on K and V read back from the pages. See `kvq_core.plan.library`."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kvq_core.arguments import AttentionCall
from kvq_core.plan import LibraryPlan, library_is_faster, plan_library_attention
from kvq_jax._interop import device_facts
from kvq_jax._triton import launch
from kvq_jax.cache import KVCache


def paged_attention(
    call: AttentionCall,
    max_seqlen_k: int | None,
    q: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    seq_lens: jax.Array,
    cu_seqlens_q: jax.Array | None,
    *,
    is_wanted: bool,
    return_lse: bool,
) -> jax.Array | None:
    """Return values ``[num_q_tokens, num_q_heads, head_dim]``; None if the library cannot make them, or is slower.

    Raises:
        NotImplementedError: ``is_wanted``, and the library cannot do it.
    """
    device = device_facts(cache.pages)
    if not is_wanted and not library_is_faster(call, max_seqlen_k, device):
        return None
    plan = plan_library_attention(cache.layout, call, max_seqlen_k, device)
    needs_lse = return_lse or call.sinks is not None or (max_seqlen_k or 0) > (call.max_seqlen_q or q.shape[0])
    if isinstance(plan, LibraryPlan) and needs_lse:  # which jax.nn rounds to bfloat16: too coarse
        plan = "expected no log-sum-exp to be needed; got return_lse, sinks, or max_seqlen_k > max_seqlen_q"
    if isinstance(plan, LibraryPlan):
        return _attend(plan, device, q, cache, page_table, seq_lens, cu_seqlens_q)
    if is_wanted:
        raise NotImplementedError(f"impl='cudnn': {plan}. Use impl='triton', or None for the best of both")
    return None


def _attend(plan, device, q, cache, page_table, seq_lens, cu_seqlens_q) -> jax.Array:
    scales = cache.k_scale, cache.v_scale
    k, v = launch(plan.gather, device, cache.pages, *scales, page_table, seq_lens)
    dense_q = q.reshape(-1, plan.num_queries, *q.shape[1:])
    out = dense_attention(dense_q, k, v, plan.sm_scale)
    no_lse = jnp.zeros((len(dense_q), q.shape[1], plan.num_queries), jnp.float32)
    unused = cache.k_scale, cache.k_scale
    inputs = q, cache.pages, *scales, *unused, page_table, seq_lens, cu_seqlens_q
    return launch(plan.finish, device, *inputs, out.reshape(*q.shape[:2], -1), no_lse, out, no_lse)[0]


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """cuDNN's causal attention of ``[num_seqs, length, num_heads, head_dim]``."""
    return jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, implementation="cudnn")
