"""kvq: a quantized, paged KV cache with the same bytes in PyTorch and in JAX.

This package holds what the two share, and needs neither of them: `modes` names the storage modes, `layout` and `mla`
say where each byte lies, `codec` turns rows into codes and scales, `arguments` checks calls, `plan` decides launches,
`kernels` (Triton) executes them. `reference` is the specification in numpy; `checks` are opt-in checks of values;
`scales` and `checkpoint` say where the scales of per-tensor modes come from. `policy` chooses the layout of every layer
of a model, `planner` says what fits into a memory, and ``python -m kvq_core plan`` shows both.

    >>> import numpy as np, kvq_core
    >>> layout = kvq_core.CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)
    >>> pages = np.zeros(layout.shape(num_pages=4), np.uint8)
    >>> kv = np.ones((3, 8, 128), np.float32)
    >>> kvq_core.reference.append_kv(layout, pages, kv, kv, slot_mapping=np.arange(3))

The PyTorch ops are in ``kvq_torch``, the JAX ops in ``kvq_jax``.
"""

from __future__ import annotations

from kvq_core import checks, planner, policy, reference
from kvq_core.checkpoint import load_kv_scales
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout
from kvq_core.modes import (
    KVQuantMode,
    get_kv_quant_mode,
    kv_cache_uses_per_token_head_scales,
    parse_kv_cache_dtype,
)
from kvq_core.scales import kv_scales_from_absmax

__version__ = "0.1.0"

__all__ = [
    "CacheLayout",
    "KVQuantMode",
    "MLALayout",
    "checks",
    "get_kv_quant_mode",
    "kv_cache_uses_per_token_head_scales",
    "kv_scales_from_absmax",
    "load_kv_scales",
    "parse_kv_cache_dtype",
    "planner",
    "policy",
    "reference",
]
