"""One pool of pages for all layers of a model, written by numpy, PyTorch and JAX in the same way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import torch

import kvq_jax
import kvq_torch
from kvq_core import CacheLayout, reference

SPARE_PAGES = 3  # of each layer, that no sequence owns: they must stay zero


@dataclass(frozen=True)
class Placement:
    """Where tokens lie: layer l owns pages ``l * P`` to ``(l + 1) * P`` of the pool, its sequences some, shuffled.

    Args:
        num_pages: pages of the pool.
        page_table: int32 ``[num_layers, num_seqs, max_pages]``.
        slot_mapping: int32 ``[num_layers, num_tokens]``, the tokens of one sequence after those of another.
        seq_lens: int32 ``[num_seqs]``.
        cu_seqlens_q: int32 ``[num_seqs + 1]``; every token is a query too.
    """

    num_pages: int
    page_table: np.ndarray
    slot_mapping: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray

    @classmethod
    def shuffled(cls, num_layers: int, num_seqs: int, seq_len: int, page_size: int, seed: int = 0) -> Placement:
        """Give equally long sequences random pages of each layer's part of the pool."""
        max_pages = -(-seq_len // page_size)
        pages_per_layer = num_seqs * max_pages + SPARE_PAGES
        rng = np.random.default_rng(seed)
        owned = [rng.permutation(pages_per_layer)[: num_seqs * max_pages] for _ in range(num_layers)]
        first_pages = pages_per_layer * np.arange(num_layers)
        page_table = (np.stack(owned) + first_pages[:, None]).reshape(num_layers, num_seqs, max_pages)
        tokens = np.arange(seq_len)
        slot_mapping = page_table[:, :, tokens // page_size] * page_size + tokens % page_size
        return cls(
            num_pages=num_layers * pages_per_layer,
            page_table=page_table.astype(np.int32),
            slot_mapping=slot_mapping.reshape(num_layers, -1).astype(np.int32),
            seq_lens=np.full(num_seqs, seq_len, np.int32),
            cu_seqlens_q=np.arange(num_seqs + 1, dtype=np.int32) * seq_len,
        )


class NumpyPool:
    """The specification: `kvq_core.reference`."""

    def __init__(self, layout: CacheLayout, placement: Placement):
        self._layout, self._placement = layout, placement
        self._pages = np.zeros(layout.shape(placement.num_pages), np.uint8)

    def append(self, layer_index: int, k: np.ndarray, v: np.ndarray) -> None:
        reference.append_kv(self._layout, self._pages, k, v, self._placement.slot_mapping[layer_index])

    def pages(self) -> np.ndarray:
        return self._pages


class TorchPool:
    """`kvq_torch` on the CPU."""

    def __init__(self, layout: CacheLayout, placement: Placement):
        self._placement = placement
        self._cache = kvq_torch.KVCache(layout, placement.num_pages, device="cpu")

    def append(self, layer_index: int, k: np.ndarray, v: np.ndarray) -> None:
        kvq_torch.append_kv_(self._cache, *map(torch.from_numpy, (k, v, self._placement.slot_mapping[layer_index])))

    def attend(self, layer_index: int, q: np.ndarray, sm_scale: float) -> np.ndarray:
        placement = self._placement
        out = kvq_torch.paged_attention(
            torch.from_numpy(q),
            self._cache,
            torch.from_numpy(placement.page_table[layer_index]),
            torch.from_numpy(placement.seq_lens),
            cu_seqlens_q=torch.from_numpy(placement.cu_seqlens_q),
            max_seqlen_q=int(placement.seq_lens.max()),
            sm_scale=sm_scale,
        )
        return out.numpy()

    def pages(self) -> np.ndarray:
        return self._cache.pages.numpy()


class JaxPool:
    """`kvq_jax` on the CPU."""

    def __init__(self, layout: CacheLayout, placement: Placement):
        self._placement = placement
        self._cache = kvq_jax.KVCache.create(layout, placement.num_pages)

    def append(self, layer_index: int, k: np.ndarray, v: np.ndarray) -> None:
        slots = self._placement.slot_mapping[layer_index]
        self._cache = _jax_append(self._cache, *map(jnp.asarray, (k, v, slots)))

    def attend(self, layer_index: int, q: np.ndarray, sm_scale: float) -> np.ndarray:
        placement = self._placement
        out = kvq_jax.paged_attention(
            jnp.asarray(q),
            self._cache,
            jnp.asarray(placement.page_table[layer_index]),
            jnp.asarray(placement.seq_lens),
            cu_seqlens_q=jnp.asarray(placement.cu_seqlens_q),
            max_seqlen_q=int(placement.seq_lens.max()),
            sm_scale=sm_scale,
        )
        return np.asarray(out)

    def pages(self) -> np.ndarray:
        return np.asarray(self._cache.pages)


_jax_append = jax.jit(kvq_jax.append_kv, donate_argnums=0)


def sha256(pages: np.ndarray) -> str:
    """The digest of all bytes of a pool."""
    return hashlib.sha256(pages.tobytes()).hexdigest()
