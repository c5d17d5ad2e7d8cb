"""Causal prefill of one long prompt: kvq, dense cuDNN attention, and FlashInfer's paged FA3."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kvq_torch
from bench import gate, peers, pools, tables
from bench.cases import BF16, DecodeCase, PrefillCase
from bench.rows import FLASHINFER, LIBRARY, TORCH, Row
from bench.timing import Call, device_time

NUM_SETS = 2
TOLERANCE = {BF16: 1e-2}  # relative L2, against dense attention on the values before they were quantized
QUANTIZED_TOLERANCE = 5e-2
FA3_HEAD_DIMS = (128,)  # each compiles for two minutes


def measure(case: PrefillCase, with_peers: bool) -> Iterator[Row]:
    """Rows of ``case``: the dense library first, which the others are held against.

    Raises:
        RedGateError: a result is wrong.
    """
    pool = case.as_decode()
    qs = [pools.queries(pool, seed) for seed in range(NUM_SETS)]
    dense = [_dense_call(pool, q, seed) for seed, q in enumerate(qs)]
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        expected = dense[0]()[0].transpose(0, 1)
        row = _row(case, LIBRARY, BF16, dense)
    yield row
    for mode in case.modes:
        yield _row(case, TORCH, mode, _kvq_calls(pool, mode, qs, expected))
    if with_peers and case.head_dim in FA3_HEAD_DIMS:
        calls = peers.prefill_calls(pool, qs)
        _check(f"FlashInfer FA3, {case.name}", calls[0](), expected, BF16)
        yield _row(case, FLASHINFER, BF16, calls)


def _row(case: PrefillCase, impl: str, mode: str, calls: Sequence[Call]) -> Row:
    versus = None if impl == LIBRARY else (case.name, LIBRARY, BF16)
    shape = case.as_decode().shape()
    return Row("prefill", case.name, impl, mode, device_time(calls), shape, num_flops=case.num_flops, versus=versus)


def _dense_call(pool: DecodeCase, q: torch.Tensor, seed: int) -> Call:
    """Library attention on the same values in the order of the page table, ``[1, heads, length, head_dim]``."""
    pages = pools.flashinfer_pool(pool, BF16, seed)[torch.from_numpy(tables.page_table(pool)[0]).cuda()]
    k, v = (pages[:, side].flatten(0, 1).transpose(0, 1)[None].contiguous() for side in range(2))
    q = q.transpose(0, 1)[None].contiguous()
    return functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)


def _kvq_calls(pool: DecodeCase, mode: str, qs: list[torch.Tensor], expected: torch.Tensor) -> Sequence[Call]:
    table = torch.from_numpy(tables.page_table(pool)).cuda()
    seq_lens = torch.tensor(pool.seq_lens, dtype=torch.int32).cuda()
    starts = torch.tensor([0, pool.queries], dtype=torch.int32).cuda()
    run = functools.partial(kvq_torch.paged_attention, cu_seqlens_q=starts, max_seqlen_q=pool.queries)
    calls = [functools.partial(run, q, pools.kvq_cache(pool, mode, seed), table, seq_lens) for seed, q in enumerate(qs)]
    _check(f"full size, {pool.name} {mode}", calls[0](), expected, mode)
    return calls


def _check(what: str, out: torch.Tensor, expected: torch.Tensor, mode: str) -> None:
    error = torch.linalg.vector_norm(out.float() - expected.float()) / torch.linalg.vector_norm(expected.float())
    gate.check_close(what, error.item(), TOLERANCE.get(mode, QUANTIZED_TOLERANCE))
