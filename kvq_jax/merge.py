"""Attention in parts: the results over disjoint sets of keys become that over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kvq_core.arguments import ArraySpec, check_merge_states
from kvq_jax._interop import Array, array_spec, as_jax


def merge_states(outs: Array | Sequence[Array], lses: Array | Sequence[Array]) -> tuple[jax.Array, jax.Array]:
    """Merge attention over disjoint sets of keys: ``lse = log sum exp(lse_i)``, ``out = sum exp(lse_i - lse) out_i``.

    The parts are what ``paged_attention(..., return_lse=True)`` gave for the same queries over the keys of each: a
    shared prefix and what follows it, or the shards of a context. Keys before the queries are attended to with
    ``causal=False``, and ``sinks`` are given to one part only, or they would count once a part. ``window`` and
    ``alibi_slopes`` look at positions, which a part counts from its own keys: they do not merge.

    A part with lse -inf saw no key and is left out, whatever its values. A part with lse NaN or +inf makes the result
    NaN. A NaN or an infinity among the values of any other part reaches the result, however small the part's share.
    It is plain jnp in float32. See FlashInfer, https://arxiv.org/abs/2501.01005.

    Args:
        outs: bfloat16, float16 or float32 ``[num_parts, num_q_tokens, num_q_heads, head_dim_v]``, or a sequence of
            parts. Inside ``shard_map`` over a context, ``jax.lax.all_gather`` makes it of the shards.
        lses: float32 ``[num_parts, num_q_tokens, num_q_heads]``, natural logarithms, or a sequence of parts.

    Returns:
        Values ``[num_q_tokens, num_q_heads, head_dim_v]`` in the dtype of ``outs`` and log-sum-exp, float32
        ``[num_q_tokens, num_q_heads]``; zeros and -inf where no part saw a key.

    Raises:
        TypeError, ValueError: an argument is not as above, or there is no part.
    """
    outs, lses = _as_jax("outs", outs), _as_jax("lses", lses)
    check_merge_states(_specs(outs), _specs(lses))
    return _merge_states(outs, lses)


@jax.jit
def _merge_states(outs: jax.Array | list[jax.Array], lses: jax.Array | list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    outs, lses = (x if isinstance(x, jax.Array) else jnp.stack(x) for x in (outs, lses))
    peak = lses.max(0)
    shift = jnp.where(peak == -jnp.inf, 0.0, peak)
    weights = jnp.exp(lses - shift)
    total = weights.sum(0)
    weights = (weights / jnp.where(total == 0, 1.0, total))[..., None]
    values = jnp.where((lses == -jnp.inf)[..., None], 0.0, outs.astype(jnp.float32))
    merged = jnp.where(jnp.isfinite(values), weights * values, weights + values).sum(0)
    return merged.astype(outs.dtype), shift + jnp.log(total)


def _as_jax(name: str, parts: Array | Sequence[Array]) -> jax.Array | list[jax.Array]:
    if isinstance(parts, jax.Array | np.ndarray):
        return as_jax(name, parts)
    if not isinstance(parts, Sequence):
        raise TypeError(f"expected {name} to be an array or a sequence of them; got {type(parts).__name__}")
    return [as_jax(f"{name}[{i}]", part) for i, part in enumerate(parts)]


def _specs(parts: jax.Array | list[jax.Array]) -> ArraySpec | list[ArraySpec]:
    return array_spec(parts) if isinstance(parts, jax.Array) else [array_spec(part) for part in parts]
