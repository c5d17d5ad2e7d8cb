"""Filled pools on a GPU and attention over them, for the tests that need one."""

from __future__ import annotations

from typing import NamedTuple

import torch

from kvq_core import CacheLayout
from kvq_torch import KVCache, append_kv_

NUM_KV_HEADS, NUM_Q_HEADS, HEAD_DIM, PAGE_SIZE = 2, 8, 128, 16


def layout_of(mode: str) -> CacheLayout:
    """The one geometry of these tests, so that they share compiled kernels."""
    return CacheLayout(mode, page_size=PAGE_SIZE, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)


def values(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal values on the GPU."""
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda").to(dtype)


def indices(data, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Integers on the GPU."""
    return torch.tensor(data, dtype=dtype, device="cuda")


class Tokens(NamedTuple):
    """K and V ``[num_tokens, num_kv_heads, head_dim]`` and their slots."""

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor


def tokens(num_tokens: int, seed: int, first_slot: int = 0) -> Tokens:
    """Random tokens for consecutive slots."""
    k, v = (values(num_tokens, NUM_KV_HEADS, HEAD_DIM, seed=seed + i) for i in range(2))
    return Tokens(k, v, torch.arange(first_slot, first_slot + num_tokens, device="cuda"))


def poisoned_cache(layout: CacheLayout, num_pages: int) -> KVCache:
    """A pool of 0xFF on the GPU."""
    return KVCache(layout, pages=torch.full(layout.shape(num_pages), 0xFF, dtype=torch.uint8, device="cuda"))


class Batch(NamedTuple):
    """Sequences over a pool; each owns pages in random order, then come ids outside the pool."""

    cache: KVCache
    page_table: torch.Tensor
    seq_lens: torch.Tensor


def batch(layout: CacheLayout, seq_lens: list[int], seed: int = 0, spare_columns: int = 1) -> Batch:
    """A poisoned pool with the tokens of sequences of ``seq_lens`` tokens."""
    counts = [-(-seq_len // PAGE_SIZE) for seq_len in seq_lens]
    ids = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.int32).cuda()
    page_table = indices([[-1] * (max(counts) + spare_columns)] * len(seq_lens))
    cache = poisoned_cache(layout, sum(counts) + 1)
    for seq, (seq_len, own) in enumerate(zip(seq_lens, ids.split(counts), strict=True)):
        page_table[seq, : len(own)] = own
        position = torch.arange(seq_len, device="cuda")
        slots = own[position // PAGE_SIZE].long() * PAGE_SIZE + position % PAGE_SIZE
        append_kv_(cache, *tokens(seq_len, seed=seed + 10 * seq + 1)[:2], slots)
    return Batch(cache, page_table, indices(seq_lens))


def cu_seqlens(counts: list[int]) -> torch.Tensor:
    """``cu_seqlens_q`` of sequences with so many queries."""
    return indices([0, *torch.tensor(counts).cumsum(0).tolist()])
