"""The ops in plain jnp: the default on a CPU, with exact bytes there, and a reader on every device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from kvq_core.layout import CacheLayout
from kvq_core.mla_arguments import check_kind
from kvq_jax._codec import cast, encode_rows
from kvq_jax._interop import platform
from kvq_jax._pages import is_page, read_pages, read_records, to_pool, write_rows
from kvq_jax._xla_attention import mla_attention, paged_attention
from kvq_jax.cache import KVCache

__all__ = ["append_kv", "copy_pages", "gather_kv", "mla_attention", "paged_attention"]


def append_kv(cache: KVCache, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Return the pages with the tokens written to their slots.

    Raises:
        NotImplementedError: quantized modes on a GPU, where XLA divides approximately and the bytes would differ.
    """
    layout, pages = check_kind(cache.layout, CacheLayout), cache.pages
    if platform(pages) != "cpu" and (layout.k_mode.is_quantized or layout.v_mode.is_quantized):
        raise NotImplementedError(
            f"expected a CPU, or an unquantized mode, for append_kv with impl='xla'; got {layout.kv_cache_dtype} on "
            f"{platform(pages)!r}, where XLA divides approximately. Use impl='triton'"
        )
    return _append_kv(cache, k, v, slot_mapping) if slot_mapping.size else pages


@jax.jit
def _append_kv(cache: KVCache, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    layout, pages = check_kind(cache.layout, CacheLayout), cache.pages
    page_ids, offsets = jnp.divmod(jnp.where(_is_last(slot_mapping), slot_mapping, -1), layout.page_size)
    page_ids = to_pool(page_ids, pages)
    for side, x, mode, scale in (("k", k, layout.k_mode, cache.k_scale), ("v", v, layout.v_mode, cache.v_scale)):
        codes, scales = encode_rows(x, mode, scale)
        pages = write_rows(cache, pages, f"{side}_codes", page_ids, offsets, codes)
        if scales is not None:
            pages = write_rows(cache, pages, f"{side}_scales", page_ids, offsets, scales)
    return pages


@functools.partial(jax.jit, static_argnames="dtype")
def gather_kv(cache: KVCache, page_table: jax.Array, seq_lens: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Return K and V of the sequences as dense arrays."""
    k, v = read_pages(cache, page_table)
    is_token = (jnp.arange(k.shape[1]) < seq_lens[:, None])[..., None, None]
    return cast(jnp.where(is_token, k, 0), dtype), cast(jnp.where(is_token, v, 0), dtype)


@jax.jit
def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Return the pages with page ``src[i]`` copied to page ``dst[i]``."""
    if not src.size:
        return pages
    dst = jnp.where(is_page(src, pages), to_pool(dst, pages), pages.shape[0])
    return pages.at[dst].set(read_records(pages, src), mode="drop")


def _is_last(slots: jax.Array) -> jax.Array:
    """Whether a token is the last with its slot. The others are dropped: a scatter may mix rows of equal slots."""
    order = jnp.argsort(slots, stable=True)
    in_order = slots[order]
    is_last = jnp.concatenate([in_order[1:] != in_order[:-1], jnp.ones(1, bool)])
    return jnp.zeros(slots.shape, bool).at[order].set(is_last)
