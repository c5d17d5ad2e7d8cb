"""The KV cache of one layer as a pytree of three arrays."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """The cache of one layer; make one with `KVCache.create`.

    The constructor checks nothing, because JAX rebuilds pytrees with placeholders for leaves. It also makes the specs
    that ``shard_map`` wants: ``KVCache(P(None, "tp"), P(), P(), layout)`` shards over KV heads.

    JAX arrays are dense, so a row container with heads inside slots needs a layout with ``row_order="NHD"``, whose KV
    heads lie on axis 2. Layers that share an array ``[num_pages, num_layers, ..]`` are a pool of ``num_pages *
    num_layers`` pages after a reshape: page p of layer l is ``p * num_layers + l``.

    Args:
        pages: uint8 ``[num_pages, num_kv_heads, record_bytes]``, or the axes of a row container; inside ``shard_map``,
            the local KV heads.
        k_scale: float32 ``[]``, the scale of K in a per-tensor mode.
        v_scale: float32 ``[]``, the scale of V in a per-tensor mode.
        layout: the byte layout, a `CacheLayout` or an `MLALayout`; static, so that another layout is another trace.
    """

    pages: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array
    layout: CacheLayout | MLALayout = field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        layout: CacheLayout | MLALayout,
        num_pages: int | None = None,
        *,
        pages: Any = None,
        sharding: jax.sharding.Sharding | None = None,
        k_scale: Any = 1.0,
        v_scale: Any = 1.0,
    ) -> KVCache:
        """Allocate a pool of zero bytes, or wrap the bytes of an existing one.

        Args:
            layout: the byte layout.
            num_pages: pages to allocate.
            pages: instead of ``num_pages``, uint8 with the axes of the layout, from JAX or numpy.
            sharding: where the pages go, e.g. ``NamedSharding(mesh, P(None, "tp"))`` for KV heads over a mesh axis.
            k_scale: the scale of K in a per-tensor mode, a number or an array of one element.
            v_scale: the scale of V in a per-tensor mode.

        Raises:
            TypeError: ``pages`` is not uint8.
            ValueError: both or neither of ``num_pages`` and ``pages``; a shape that is not that of the layout.
        """
        if (num_pages is None) == (pages is None):
            raise ValueError("expected either num_pages, to allocate, or pages, to wrap; got " + _both(num_pages))
        if pages is None:
            pages = _zero_pages(layout, num_pages, sharding)
        else:
            _check_pages(layout, pages)
            pages = jnp.asarray(pages) if sharding is None else jax.device_put(pages, sharding)
        return cls(pages, _scalar("k_scale", k_scale), _scalar("v_scale", v_scale), layout)


def as_records(cache: KVCache) -> KVCache:
    """The same pages of an MLA cache as those of one KV head: K is the latent, V the rope part, of one scale."""
    if not isinstance(cache.layout, MLALayout):
        return cache
    return replace(cache, layout=cache.layout.records, v_scale=cache.k_scale)


def _both(num_pages: Any) -> str:
    return "neither" if num_pages is None else "both"


def _zero_pages(layout: CacheLayout | MLALayout, num_pages: Any, sharding: jax.sharding.Sharding | None) -> jax.Array:
    if isinstance(num_pages, bool) or not hasattr(num_pages, "__index__") or num_pages.__index__() < 0:
        raise ValueError(f"expected num_pages to be an integer from 0; got {num_pages!r}")
    return jnp.zeros(layout.shape(num_pages.__index__()), jnp.uint8, device=sharding)


def _check_pages(layout: CacheLayout | MLALayout, pages: Any) -> None:
    if not isinstance(pages, jax.Array | np.ndarray):
        raise TypeError(f"expected pages to be a JAX or numpy array; got {type(pages).__name__}")
    if pages.dtype != np.uint8:
        raise TypeError(f"expected pages of dtype uint8; got {pages.dtype}. Reinterpret the bytes, do not cast them")
    sizes = layout.shape(0)[1:]
    if pages.ndim != len(layout.axes) or pages.shape[1:] != sizes:
        wanted = ", ".join(f"{axis}={size}" for axis, size in zip(layout.axes[1:], sizes, strict=True))
        raise ValueError(
            f"expected pages of shape [num_pages, {wanted}] for {layout.fingerprint()}; got {list(pages.shape)}. "
            "Pass layout.shard(n) for one of n shards"
        )


def _scalar(name: str, scale: Any) -> jax.Array:
    if np.size(scale) != 1:
        raise ValueError(f"expected {name} to be one number; got shape {list(np.shape(scale))}")
    # A copy of its own: the caller's array must outlive a donated cache, and k_scale may be v_scale.
    return jnp.array(scale, jnp.float32, copy=True).reshape(())
