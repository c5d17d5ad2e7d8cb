"""Quantize-on-write through kvq_torch, and what a decoding step costs the host."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch

import kvq_torch
from bench import gate, peers, pools, tables
from bench.cases import BF16, INT8, AppendCase, DecodeCase
from bench.rows import FLASHINFER, PLAIN, TORCH, Bar, Row
from bench.timing import COLD_BYTES, device_time, host_time

HOST_US = 60.0
_HOST_CASE = "append + attention"


def measure(case: AppendCase) -> Iterator[Row]:
    """Rows of ``case``, one a mode.

    Raises:
        RedGateError: a byte is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    slots, num_pages = tables.slot_mapping(case)
    slots = torch.from_numpy(slots).cuda()
    shape = case.num_tokens, case.num_kv_heads, case.head_dim
    rows = [[torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2)] for _ in range(num_sets)]
    for mode in case.modes:
        caches = [kvq_torch.KVCache(case.layout(mode), num_pages, device="cuda") for _ in range(num_sets)]
        calls = [
            functools.partial(kvq_torch.append_kv_, cache, *kv, slots) for cache, kv in zip(caches, rows, strict=True)
        ]
        calls[0]()
        _check(case, mode, caches[0], rows[0], slots)
        timing = device_time(calls)
        yield Row("append", case.name, TORCH, mode, timing, case.shape(), case.num_bytes(mode), bar=case.bar)


def measure_host(case: DecodeCase, with_peers: bool) -> Iterator[Row]:
    """The host's time for one append of a token a sequence and one attention: no graph, no autograd.

    Beside it FlashInfer's, and that of one small op of torch, because a figure says little without its CPU.
    """
    x, y = (torch.zeros(len(case.seq_lens), device="cuda") for _ in range(2))
    calls = {(PLAIN, "float32"): functools.partial(torch.add, x, x, out=y), (TORCH, INT8): _step(case)}
    if with_peers:
        calls[FLASHINFER, BF16] = peers.step(case, pools.queries(case, 0))
    with torch.inference_mode():
        timings = {who: host_time(call) for who, call in calls.items()}
    for (impl, mode), timing in timings.items():
        bar = Bar("us", HOST_US) if impl == TORCH else None
        versus = (_HOST_CASE, FLASHINFER, BF16) if impl == TORCH else None
        yield Row("host", _HOST_CASE, impl, mode, timing, case.shape(), versus=versus, bar=bar)


def _step(case: DecodeCase) -> Callable[[], None]:
    """One append and one attention through kvq."""
    cache, q = pools.kvq_cache(case, INT8, 0), pools.queries(case, 0)
    table = torch.from_numpy(tables.page_table(case)).cuda()
    seq_lens = torch.tensor(case.seq_lens, dtype=torch.int32).cuda()
    kv = pools.new_rows(case)
    slots = torch.arange(len(case.seq_lens), device="cuda")

    def step() -> None:
        kvq_torch.append_kv_(cache, *kv, slots)
        kvq_torch.paged_attention(q, cache, table, seq_lens)

    return step


def _check(case: AppendCase, mode: str, cache: kvq_torch.KVCache, kv: list[torch.Tensor], slots: torch.Tensor) -> None:
    """The whole pool against eager PyTorch, which the tests hold to the reference; numpy would take minutes."""
    want = kvq_torch.KVCache(cache.layout, cache.num_pages, device="cuda")
    kvq_torch.append_kv_(want, kv[0], kv[1], slots, impl="eager")
    num_wrong = int((cache.pages != want.pages).sum())
    gate.check_close(f"full size, {case.name} {mode}, share of bytes that differ", num_wrong / want.pages.numel(), 0.0)
