"""Pools of random keys and values for PyTorch and FlashInfer: the same values in every mode, page by page."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvq_torch
from bench.cases import FP8_TENSOR, DecodeCase

CHUNK_TOKENS = 2**17


def queries(case: DecodeCase, seed: int) -> torch.Tensor:
    """bfloat16 ``[num_seqs * queries, num_q_heads, head_dim]``."""
    shape = len(case.seq_lens) * case.queries, case.num_q_heads, case.head_dim
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=_generator(seed))


def kvq_cache(case: DecodeCase, mode: str, seed: int) -> kvq_torch.KVCache:
    """A cache whose every slot holds a token; its values depend on ``seed`` and the shape alone."""
    cache = kvq_torch.KVCache(case.layout(mode), case.num_pages, device="cuda")
    for start, k, v in _tokens(case, seed):
        slots = torch.arange(start, start + len(k), device="cuda")
        kvq_torch.append_kv_(cache, k, v, slots)
    return cache


def flashinfer_pool(case: DecodeCase, mode: str, seed: int) -> torch.Tensor:
    """The values of `kvq_cache` in FlashInfer's layout, ``[num_pages, 2, page_size, num_kv_heads, head_dim]``."""
    dtype = torch.float8_e4m3fn if mode == FP8_TENSOR else torch.bfloat16
    row = case.num_kv_heads, case.head_dim
    pool = torch.empty((case.num_pages, 2, case.page_size, *row), dtype=dtype, device="cuda")
    for start, *sides in _tokens(case, seed):
        first = start // case.page_size
        for side, values in enumerate(sides):
            pages = values.view(-1, case.page_size, *row)
            pool[first : first + len(pages), side] = pages.to(dtype)
    return pool


def _tokens(case: DecodeCase, seed: int) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The tokens of a pool in chunks: the first slot, K and V ``[num_tokens, num_kv_heads, head_dim]``."""
    generator = _generator(seed)
    num_slots = case.num_pages * case.page_size
    for start in range(0, num_slots, CHUNK_TOKENS):
        shape = min(CHUNK_TOKENS, num_slots - start), case.num_kv_heads, case.head_dim
        k, v = (torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=generator) for _ in range(2))
        yield start, k, v


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)
