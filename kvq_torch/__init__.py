"""A quantized, paged KV cache for PyTorch, with the same bytes as `kvq_jax`.

    layout = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)   # from kvq_core
    cache = KVCache(layout, num_pages=1024, device="cuda")
    append_kv_(cache, k, v, slot_mapping)                 # quantize on write, in place
    out = paged_attention(q, cache, page_table, seq_lens)  # attend on read
    k, v = gather_kv(cache, page_table, seq_lens)         # dense values, for inspection
    copy_pages_(cache, src, dst)                          # copy on write of shared pages
    calibrator = ScaleCalibrator("fp8_e4m3")              # the scales of a per-tensor mode, from observed K and V
    out, lse = merge_states(outs, lses)                   # attention over parts of the keys, merged

A cache with an ``MLALayout`` goes with ``append_mla_``, ``gather_mla`` and ``mla_attention``.

The ops never read a value back to the host: they are safe in CUDA graphs and under ``torch.compile(fullgraph=True)``.
`kvq_core.checks` looks at values for who wants it.
"""

from kvq_torch.cache import KVCache
from kvq_torch.merge import merge_states
from kvq_torch.mla import append_mla_, gather_mla, mla_attention
from kvq_torch.ops import append_kv_, copy_pages_, gather_kv, paged_attention
from kvq_torch.scales import ScaleCalibrator

__all__ = [
    "KVCache",
    "ScaleCalibrator",
    "append_kv_",
    "append_mla_",
    "copy_pages_",
    "gather_kv",
    "gather_mla",
    "merge_states",
    "mla_attention",
    "paged_attention",
]
