"""kvq for JAX: a quantized, paged KV cache with the same bytes as in PyTorch, as pure functions on a pytree.

    layout = kvq_core.CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)
    cache = KVCache.create(layout, num_pages=1024)

    @functools.partial(jax.jit, donate_argnums=0)
    def decode(cache, q, k, v, slot_mapping, page_table, seq_lens):
        cache = append_kv(cache, k, v, slot_mapping)
        return cache, paged_attention(q, cache, page_table, seq_lens)

A cache with an ``MLALayout`` goes with ``append_mla``, ``gather_mla`` and ``mla_attention``.

Donate the cache, or every step copies the pool. ``cache.py`` holds the pytree, ``ops.py`` the functions; they run
through ``_triton.py`` on a GPU (the kernels that PyTorch runs) and through ``_xla.py`` on a CPU. ``merge.py`` merges
attention over parts of the keys, ``scales.py`` derives the scales of per-tensor modes, in jnp everywhere.
"""

from kvq_jax.cache import KVCache
from kvq_jax.merge import merge_states
from kvq_jax.mla import append_mla, gather_mla, mla_attention
from kvq_jax.ops import append_kv, copy_pages, gather_kv, paged_attention
from kvq_jax.scales import ScaleCalibrator

__all__ = [
    "KVCache",
    "ScaleCalibrator",
    "append_kv",
    "append_mla",
    "copy_pages",
    "gather_kv",
    "gather_mla",
    "merge_states",
    "mla_attention",
    "paged_attention",
]
