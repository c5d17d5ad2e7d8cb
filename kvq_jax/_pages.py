"""Reading and writing rows of the pages in jnp. Pages are addressed by axis, so no offset outgrows 32 bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kvq_jax._codec import decode_rows
from kvq_jax.cache import KVCache


def is_page(page_ids: jax.Array, pages: jax.Array) -> jax.Array:
    """Whether each id names a page of the pool."""
    return (page_ids >= 0) & (page_ids < pages.shape[0])


def to_pool(page_ids: jax.Array, pages: jax.Array) -> jax.Array:
    """The ids as int32, ``num_pages`` for those outside the pool: JAX would wrap negative ones."""
    return jnp.where(is_page(page_ids, pages), page_ids, pages.shape[0]).astype(jnp.int32)


def read_records(pages: jax.Array, page_ids: jax.Array) -> jax.Array:
    """Pages by id, uint8 ``[..., *pages.shape[1:]]``; zeros for ids outside the pool."""
    if pages.shape[0] == 0:
        return jnp.zeros(page_ids.shape + pages.shape[1:], jnp.uint8)
    return pages.at[to_pool(page_ids, pages)].get(mode="fill", fill_value=0)


def read_pages(cache: KVCache, page_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """K and V of pages ``[..., n]``: float32 ``[..., n * page_size, num_kv_heads, dim]``, NaN outside the pool."""
    layout = cache.layout
    records = read_records(cache.pages, page_ids)
    exists = is_page(page_ids, cache.pages)[..., None, None, None]

    def read_field(name: str) -> jax.Array:
        field = layout.fields[name]
        if layout.has_rows:
            rows = jnp.swapaxes(records, -3, layout.head_axis - 4)
            return lax.slice_in_dim(rows, field.offset, field.offset + field.row_bytes, axis=-1)
        rows = lax.slice_in_dim(records, field.offset, field.offset + layout.page_size * field.row_bytes, axis=-1)
        return rows.reshape(*records.shape[:-1], layout.page_size, field.row_bytes)

    def read_side(side: str) -> jax.Array:
        mode, tensor_scale = getattr(layout, f"{side}_mode"), getattr(cache, f"{side}_scale")
        scales = read_field(f"{side}_scales") if mode.is_per_token_head else tensor_scale
        rows = jnp.where(exists, decode_rows(read_field(f"{side}_codes"), mode, scales), jnp.nan)
        rows = jnp.swapaxes(rows, -3, -2)  # a record is one head of many tokens, values are many heads of one token
        return rows.reshape(*page_ids.shape[:-1], page_ids.shape[-1] * layout.page_size, *rows.shape[-2:])

    return read_side("k"), read_side("v")


def write_rows(
    cache: KVCache, pages: jax.Array, name: str, page_ids: jax.Array, offsets: jax.Array, rows: jax.Array
) -> jax.Array:
    """Write one row of a field per token and head.

    Args:
        cache: for its layout.
        pages: uint8, the axes of the layout.
        name: the field.
        page_ids: int32 ``[num_tokens]``; ``num_pages`` drops the token.
        offsets: ``[num_tokens]``, the token's place in its page.
        rows: uint8 ``[num_tokens, num_kv_heads, row_bytes]``.
    """
    field, offsets = cache.layout.fields[name], offsets.astype(jnp.int32)
    if cache.layout.has_rows:
        token_axes = (0, cache.layout.axes.index("page_size"))
        starts = [page_ids, offsets, jnp.full_like(offsets, field.offset)]
    else:
        token_axes = (0,)
        starts = [page_ids, field.offset + offsets * field.row_bytes]
    axes = lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2),
        inserted_window_dims=token_axes,
        scatter_dims_to_operand_dims=(*token_axes, pages.ndim - 1),
    )
    return lax.scatter(pages, jnp.stack(starts, axis=-1), rows, axes, mode="drop")
