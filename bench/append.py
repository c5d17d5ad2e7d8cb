"""Quantize-on-write through kvq_torch, and what a decoding step costs the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

import kvq_torch
from bench import gate, pools
from bench.cases import FP8, INT8, AppendCase, DecodeCase
from bench.rows import TORCH, Bar, Row
from bench.timing import COLD_BYTES, device_time, host_time
from tests.backends import from_torch

APPEND_MODES = (INT8, FP8)
HOST_US = 60.0
_DECODE_TOKENS = 256  # so few come one from each sequence, more are a prompt


def measure(case: AppendCase) -> Iterator[Row]:
    """Rows of ``case``, one a mode.

    Raises:
        RedGateError: a byte is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    slots, num_pages = slot_mapping(case)
    slots = torch.from_numpy(slots).cuda()
    shape = case.num_tokens, case.num_kv_heads, case.head_dim
    rows = [[torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for _ in range(num_sets)]
    for mode in APPEND_MODES:
        caches = [kvq_torch.KVCache(case.layout(mode), num_pages, device="cuda") for _ in range(num_sets)]
        calls = [
            functools.partial(kvq_torch.append_kv_, cache, *kv, slots) for cache, kv in zip(caches, rows, strict=True)
        ]
        calls[0]()
        _check(case, mode, caches[0], rows[0], slots)
        timing = device_time(calls)
        yield Row("append", case.name, TORCH, mode, timing, case.shape(), case.num_bytes(mode), bar=case.bar)


def slot_mapping(case: AppendCase) -> tuple[np.ndarray, int]:
    """Slots of the tokens, and the pages of the pool: one token a page for a decoding batch, else pages in full."""
    draw, page_size = np.random.default_rng(0), case.page_size
    if case.num_tokens <= _DECODE_TOKENS:
        pages = draw.permutation(case.num_tokens)
        return pages * page_size + draw.integers(0, page_size, case.num_tokens), case.num_tokens
    pages = draw.permutation(case.num_tokens // page_size)
    return (pages[:, None] * page_size + np.arange(page_size)).reshape(-1), len(pages)


def measure_host(case: DecodeCase) -> Iterator[Row]:
    """The host's time for one append of a token a sequence and one attention, launched without a graph."""
    cache, q = pools.kvq_cache(case, INT8, 0), pools.queries(case, 0)
    table = torch.from_numpy(pools.page_table(case)).cuda()
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32).cuda()
    kv = torch.randn(len(case.seq_lens), case.num_kv_heads, case.head_dim, dtype=torch.bfloat16, device="cuda")
    slots = torch.arange(len(case.seq_lens), device="cuda")

    def step() -> None:
        kvq_torch.append_kv_(cache, kv, kv, slots)
        kvq_torch.paged_attention(q, cache, table, seq_lens)

    yield Row("host", "append + attention", TORCH, INT8, host_time(step), case.shape(), bar=Bar("us", HOST_US))


def _check(case: AppendCase, mode: str, cache: kvq_torch.KVCache, kv: list[torch.Tensor], slots: torch.Tensor) -> None:
    """Against eager PyTorch, which the small gate and the tests hold to the reference; numpy would take minutes."""
    want = kvq_torch.KVCache(cache.layout, cache.num_pages, device="cuda")
    kvq_torch.append_kv_(want, *kv, slots, impl="eager")
    if not torch.equal(cache.pages, want.pages):
        gate.check_equal_bytes(f"full size, {case.name} {mode}", from_torch(cache.pages), from_torch(want.pages))
