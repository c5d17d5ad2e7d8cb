"""Pools of random keys and values for PyTorch and FlashInfer: the same values in every mode, page by page."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import kvq_torch
from bench.cases import BF16, FP8_TENSOR, DecodeCase, MLACase

CHUNK_TOKENS = 2**17
MLA_SCALE = 2.0**-6  # of fp8_e4m3: normal values fill its range


def queries(case: DecodeCase, seed: int) -> torch.Tensor:
    """bfloat16 ``[num_seqs * queries, num_q_heads, head_dim]``."""
    shape = len(case.seq_lens) * case.queries, case.num_q_heads, case.head_dim
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=_generator(seed))


def new_rows(case: DecodeCase) -> list[torch.Tensor]:
    """K and V of one new token a sequence, bfloat16 ``[num_seqs, num_kv_heads, head_dim]``."""
    shape = len(case.seq_lens), case.num_kv_heads, case.head_dim
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=_generator(seed)) for seed in range(2)]


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


def mla_cache(case: MLACase, mode: str) -> kvq_torch.KVCache:
    """An MLA cache whose every slot holds a token."""
    cache = kvq_torch.KVCache(case.layout(mode), case.as_decode().num_pages, device="cuda", k_scale=MLA_SCALE)
    for start, kv_c, k_pe in _mla_tokens(case):
        kvq_torch.append_mla_(cache, kv_c, k_pe, torch.arange(start, start + len(kv_c), device="cuda"))
    return cache


def flashinfer_mla_pools(case: MLACase) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of `mla_cache` in bfloat16: latents ``[num_pages, page_size, rank]``, and rope parts."""
    sides = zip(*((kv_c, k_pe) for _, kv_c, k_pe in _mla_tokens(case)), strict=True)
    latents, ropes = (torch.cat(side).view(-1, case.page_size, side[0].shape[-1]) for side in sides)
    return latents, ropes


def _mla_tokens(case: MLACase) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The tokens of a pool in chunks: the first slot, latents and rope parts."""
    generator, layout = _generator(0), case.layout(BF16)
    num_slots = case.as_decode().num_pages * case.page_size
    for start in range(0, num_slots, CHUNK_TOKENS):
        count = min(CHUNK_TOKENS, num_slots - start)
        kv_c, k_pe = (
            torch.randn((count, dim), dtype=torch.bfloat16, device="cuda", generator=generator)
            for dim in (layout.kv_lora_rank, layout.rope_dim)
        )
        yield start, kv_c, k_pe


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
