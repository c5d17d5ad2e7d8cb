"""Decoding through kvq_torch, and through FlashInfer in the same run."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

import kvq_torch
from bench import gate, peers, pools, tables
from bench.cases import BF16, DecodeCase
from bench.rows import FLASHINFER, TORCH, Row
from bench.timing import COLD_BYTES, device_time
from tests.backends import from_torch
from tests.compare import Attention


def measure(section: str, case: DecodeCase, with_peers: bool) -> Iterator[Row]:
    """Rows of ``case``: kvq in each of its modes, then its peers.

    Raises:
        RedGateError: a result is wrong.
    """
    num_sets = case.num_sets(COLD_BYTES)
    qs = [pools.queries(case, seed) for seed in range(num_sets)]
    where = torch.from_numpy(tables.page_table(case)).cuda(), torch.tensor(case.seq_lens, dtype=torch.int32).cuda()
    expected = None
    for mode in case.modes:
        caches = [pools.kvq_cache(case, mode, seed) for seed in range(num_sets)]
        run = functools.partial(kvq_torch.paged_attention, **options(case))
        out = check(case, mode, run, qs[0], caches[0], *where)
        expected = out if mode == BF16 else expected
        timing = device_time([functools.partial(run, q, cache, *where) for q, cache in zip(qs, caches, strict=True)])
        yield Row(
            section,
            case.name,
            TORCH,
            mode,
            timing,
            case.shape(),
            case.num_bytes(mode),
            case.num_flops,
            case.held_against(mode),
            case.bar_of(mode),
        )
    if with_peers:
        yield from _measure_peers(section, case, qs, expected)


def options(case: DecodeCase) -> dict[str, Any]:
    """The optional arguments of ``paged_attention`` in ``case``."""
    if case.queries == 1:
        return {"window": case.window}
    starts = torch.arange(len(case.seq_lens) + 1, dtype=torch.int32, device="cuda") * case.queries
    return {"window": case.window, "cu_seqlens_q": starts, "max_seqlen_q": case.queries}


def check(
    case: DecodeCase,
    mode: str,
    run: Callable,
    q: torch.Tensor,
    cache: kvq_torch.KVCache,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Run once, hold a few heads against the reference and return the values.

    Raises:
        RedGateError: they are wrong.
    """
    out, lse = run(q, cache, page_table, seq_lens, return_lse=True)
    for seq, head in gate.sampled(case):
        rows, heads, columns = gate.head_slices(case, seq, head)
        pages = cache.pages[page_table[seq, columns].long(), head : head + 1]
        got = Attention(from_torch(out[rows, heads]), from_torch(lse[rows, heads]))
        gate.check_full(case, mode, seq, from_torch(q[rows, heads]), from_torch(pages), got)
    return out


def _measure_peers(section: str, case: DecodeCase, qs, expected: torch.Tensor | None) -> Iterator[Row]:
    for mode in case.peers:
        calls = peers.decode_calls(case, mode, qs)
        if expected is not None:
            error = torch.linalg.vector_norm(calls[0]().float() - expected.float()) / expected.float().norm()
            gate.check_close(f"FlashInfer {mode}, {case.name}", error.item(), peers.TOLERANCE[mode])
        num_bytes = case.num_bytes(mode)
        versus = None if mode == BF16 else case.held_against(mode)
        timing = device_time(calls)
        yield Row(section, case.name, FLASHINFER, mode, timing, case.shape(), num_bytes, case.num_flops, versus)
