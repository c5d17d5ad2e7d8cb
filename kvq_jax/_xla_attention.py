"""Attention in plain jnp: sequence by sequence, its queries in tiles, all its keys at once, in float32."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kvq_core.arguments import AttentionCall
from kvq_core.mla import MLALayout
from kvq_jax._interop import vary_like
from kvq_jax._pages import is_page, read_pages
from kvq_jax.cache import KVCache, as_records

MAX_TILE_QUERIES = 128  # a sequence with fewer queries wastes the rest of its tile
MAX_TILE_SCORES = 1 << 22  # 16 MB of float32, of which a handful are alive at once
NO_WINDOW = 1 << 30  # longer than any sequence, and position - window stays within int32

_dot = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


class _Rule(NamedTuple):
    """How a query scores the keys and which it sees, the same for all sequences."""

    call: AttentionCall
    sinks: jax.Array | None  # float32 [num_kv_heads, group]
    alibi_slopes: jax.Array | None  # float32 [num_kv_heads, group]


class _Keys(NamedTuple):
    """All keys of one sequence, read from its pages."""

    seq_len: jax.Array
    k: jax.Array  # float32 [max_keys, num_kv_heads, head_dim]
    v: jax.Array  # float32 [max_keys, num_kv_heads, head_dim_v], zero past seq_len and outside the pool
    is_foreign: jax.Array  # bool [max_keys], on a page outside the pool


@functools.partial(jax.jit, static_argnames="call")
def paged_attention(
    call: AttentionCall,
    q: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    seq_lens: jax.Array,
    cu_seqlens_q: jax.Array | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return values in q's dtype ``[num_q_tokens, num_q_heads, head_dim_v]`` and log-sum-exp, float32."""
    (num_q_tokens, num_q_heads, head_dim), num_kv_heads = q.shape, cache.pages.shape[cache.layout.head_axis]
    heads = (num_kv_heads, num_q_heads // num_kv_heads)
    out = jnp.zeros((num_q_tokens, *heads, cache.layout.head_dim_v or 0), jnp.float32)
    lse = jnp.full((num_q_tokens, *heads), -jnp.inf, jnp.float32)
    inputs = [q, *jax.tree.leaves(cache), page_table, seq_lens]
    inputs += [x for x in (cu_seqlens_q, sinks, alibi_slopes) if x is not None]
    results = vary_like((out, lse), *inputs)
    most_queries = call.max_seqlen_q or num_q_tokens
    if cu_seqlens_q is None:
        cu_seqlens_q, most_queries = jnp.arange(len(seq_lens) + 1, dtype=jnp.int32), 1
    rule = _Rule(
        call,
        None if sinks is None else sinks.reshape(heads),
        None if alibi_slopes is None else alibi_slopes.reshape(heads),
    )
    rows = q.astype(jnp.float32).reshape(num_q_tokens, *heads, head_dim)
    tile = _tile_queries(most_queries, num_q_heads * page_table.shape[1] * cache.layout.page_size)

    def attend_sequence(seq: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keys = _read_keys(cache, page_table[seq], seq_lens[seq])
        return _attend_sequence(rule, keys, rows, cu_seqlens_q[seq], cu_seqlens_q[seq + 1], tile, results)

    if num_q_tokens and len(seq_lens):
        results = lax.fori_loop(0, len(seq_lens), attend_sequence, results)
    out, lse = results
    out = out.reshape(num_q_tokens, num_q_heads, out.shape[-1]).astype(q.dtype)
    return out, lse.reshape(num_q_tokens, num_q_heads)


def mla_attention(
    call: AttentionCall,
    q: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    seq_lens: jax.Array,
    cu_seqlens_q: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """`paged_attention` where a key is ``[latent | rope]`` and its value the latent."""
    return paged_attention(call, q, cache, page_table, seq_lens, cu_seqlens_q, sinks=None, alibi_slopes=None)


def _tile_queries(max_queries: int, scores_per_query: int) -> int:
    return max(1, min(max_queries, MAX_TILE_QUERIES, MAX_TILE_SCORES // max(1, scores_per_query)))


def _read_keys(cache: KVCache, page_ids: jax.Array, seq_len: jax.Array) -> _Keys:
    if isinstance(cache.layout, MLALayout):
        v, rope = read_pages(as_records(cache), page_ids)
        k = jnp.concatenate([v, rope], axis=-1)
    else:
        k, v = read_pages(cache, page_ids)
    is_foreign = jnp.repeat(~is_page(page_ids, cache.pages), cache.layout.page_size)
    is_readable = (jnp.arange(k.shape[0]) < seq_len) & ~is_foreign
    return _Keys(seq_len, k, jnp.where(is_readable[:, None, None], v, 0), is_foreign)


def _attend_sequence(
    rule: _Rule,
    keys: _Keys,
    q: jax.Array,
    start: jax.Array,
    end: jax.Array,
    tile: int,
    results: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Fill in the results of rows ``start`` to ``end`` of q; only the device knows how many tiles that takes."""

    def attend_tile(i: jax.Array, results: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows = start + i * tile + jnp.arange(tile, dtype=jnp.int32)
        out, lse = _attend(rule, keys, q.at[rows].get(mode="clip"), keys.seq_len - end + rows)
        rows = jnp.where(rows < end, rows, len(q))
        return results[0].at[rows].set(out, mode="drop"), results[1].at[rows].set(lse, mode="drop")

    return lax.fori_loop(0, (end - start + tile - 1) // tile, attend_tile, results)


def _attend(rule: _Rule, keys: _Keys, q: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Values ``[queries, num_kv_heads, group, head_dim_v]`` and log-sum-exp of queries at ``positions``."""
    visible = _visible(rule, keys, positions)
    scores = jnp.where(visible[:, None, None], _scores(rule, keys, q, positions), -jnp.inf)
    maximum = scores.max(axis=-1, initial=-jnp.inf)
    if rule.sinks is not None:
        maximum = jnp.maximum(maximum, rule.sinks)
    maximum = jnp.where(maximum == -jnp.inf, 0, maximum)
    weights = jnp.exp(scores - maximum[..., None])
    total = weights.sum(axis=-1)
    if rule.sinks is not None:
        total = total + jnp.exp(rule.sinks - maximum)
    out = _weighted_values(weights, visible, keys.v) / jnp.where(total == 0, 1, total)[..., None]
    is_poisoned = _is_poisoned(rule, keys, positions, visible)[:, None, None]
    lse = jnp.where(is_poisoned, jnp.nan, maximum + jnp.log(total))
    return jnp.where(is_poisoned[..., None] | jnp.isnan(lse)[..., None], jnp.nan, out), lse


def _visible(rule: _Rule, keys: _Keys, positions: jax.Array) -> jax.Array:
    """bool ``[queries, max_keys]``."""
    j, p = jnp.arange(keys.k.shape[0]), positions[:, None]
    visible = (j < keys.seq_len) & (j > p - min(rule.call.window or NO_WINDOW, NO_WINDOW))
    return visible & (j <= p) if rule.call.causal else visible


def _scores(rule: _Rule, keys: _Keys, q: jax.Array, positions: jax.Array) -> jax.Array:
    """float32 ``[queries, num_kv_heads, group, max_keys]``, not masked yet."""
    scores = _dot("thgd,jhd->thgj", q, keys.k) * rule.call.score_scale
    softcap = rule.call.softcap
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if rule.alibi_slopes is not None:
        distances = (jnp.arange(keys.k.shape[0]) - positions[:, None]).astype(jnp.float32)
        scores = scores + rule.alibi_slopes[..., None] * distances[:, None, None]
    return scores


def _weighted_values(weights: jax.Array, visible: jax.Array, v: jax.Array) -> jax.Array:
    """``weights @ v``, where a value that is not finite reaches only the queries that see it."""
    is_finite = jnp.isfinite(v)
    out = _dot("thgj,jhd->thgd", weights, jnp.where(is_finite, v, 0))

    def add_others() -> jax.Array:
        seen = visible.astype(jnp.float32)
        rising = _dot("tj,jhd->thd", seen, (~is_finite & ~(v < 0)).astype(jnp.float32)) > 0
        falling = _dot("tj,jhd->thd", seen, (~is_finite & ~(v > 0)).astype(jnp.float32)) > 0
        infinity = jnp.where(rising, jnp.where(falling, jnp.nan, jnp.inf), jnp.where(falling, -jnp.inf, 0))
        return out + infinity[:, :, None]

    return lax.cond(is_finite.all(), lambda: out, add_others)


def _is_poisoned(rule: _Rule, keys: _Keys, positions: jax.Array, visible: jax.Array) -> jax.Array:
    """Whether each query sees a key on a page outside the pool, or past the page table: bool ``[queries]``."""
    last = keys.seq_len - 1
    last = jnp.minimum(positions, last) if rule.call.causal else jnp.broadcast_to(last, positions.shape)
    return (visible & keys.is_foreign).any(axis=-1) | (last >= keys.k.shape[0])
