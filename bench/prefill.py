"""Causal prefill of one sequence: kvq, dense cuDNN attention, and FlashInfer's paged FA3."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import kvq_torch
from bench import gate, peers, pools, tables
from bench.cases import BF16, INT8, DecodeCase, PrefillCase
from bench.rows import FLASHINFER, KERNEL, LIBRARY, TORCH, Row
from bench.timing import Call, device_time

NUM_SETS = 2
TOLERANCE = {BF16: 1e-2}  # relative L2, against attention on the values before they were quantized
QUANTIZED_TOLERANCE = 5e-2
FA3_HEAD_DIMS = (128,)  # each compiles for two minutes
KERNEL_FLOPS = 2e12  # the kernel on pages alone is measured up to here


def measure(case: PrefillCase, with_peers: bool) -> Iterator[Row]:
    """Rows of ``case``: the dense library first, where it can, which the others are held against.

    Raises:
        RedGateError: a result is wrong.
    """
    pool = case.as_decode()
    qs = [pools.queries(pool, seed) for seed in range(NUM_SETS)]
    if case.has_prefix:
        expected = _kvq_calls(pool, BF16, qs, None, impl="triton")[0]()
    else:
        dense = [_dense_call(pool, q, seed) for seed, q in enumerate(qs)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            expected = dense[0]()[0].transpose(0, 1)
            row = _row(case, LIBRARY, BF16, dense)
        yield row
    if with_peers and case.head_dim in FA3_HEAD_DIMS:
        calls = peers.prefill_calls(pool, qs)
        _check(f"FlashInfer FA3, {case.name}", calls[0](), expected, BF16)
        yield _row(case, FLASHINFER, BF16, calls)
    for mode in case.modes:
        yield _row(case, TORCH, mode, _kvq_calls(pool, mode, qs, expected))
    if case.num_flops <= KERNEL_FLOPS:
        yield _row(case, KERNEL, INT8, _kvq_calls(pool, INT8, qs, expected, impl="triton"))


def _row(case: PrefillCase, impl: str, mode: str, calls: Sequence[Call]) -> Row:
    peer = FLASHINFER if case.has_prefix else LIBRARY
    return Row(
        "prefill",
        case.name,
        impl,
        mode,
        device_time(calls),
        case.as_decode().shape(),
        num_flops=case.num_flops,
        versus=None if impl == peer else (case.name, peer, BF16),
        bar=case.bar if impl == TORCH and mode != BF16 else None,
    )


def _dense_call(pool: DecodeCase, q: torch.Tensor, seed: int) -> Call:
    """Library attention on the same values in the order of the page table, ``[1, heads, length, head_dim]``."""
    pages = pools.flashinfer_pool(pool, BF16, seed)[torch.from_numpy(tables.page_table(pool)[0]).cuda()]
    k, v = (pages[:, side].flatten(0, 1).transpose(0, 1)[None].contiguous() for side in range(2))
    q = q.transpose(0, 1)[None].contiguous()
    return functools.partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)


def _kvq_calls(
    pool: DecodeCase, mode: str, qs: list[torch.Tensor], expected: torch.Tensor | None, impl: str | None = None
) -> Sequence[Call]:
    table = torch.from_numpy(tables.page_table(pool)).cuda()
    seq_lens = torch.tensor(pool.seq_lens, dtype=torch.int32).cuda()
    lengths = {
        "cu_seqlens_q": torch.tensor([0, pool.queries], dtype=torch.int32).cuda(),
        "max_seqlen_q": pool.queries,
        "max_seqlen_k": pool.seq_lens[0],
    }
    run = functools.partial(kvq_torch.paged_attention, **lengths, impl=impl)
    calls = [functools.partial(run, q, pools.kvq_cache(pool, mode, seed), table, seq_lens) for seed, q in enumerate(qs)]
    if expected is not None:
        _check(f"full size, {pool.name} {mode}", calls[0](), expected, mode)
    return calls


def _check(what: str, out: torch.Tensor, expected: torch.Tensor, mode: str) -> None:
    error = torch.linalg.vector_norm(out.float() - expected.float()) / torch.linalg.vector_norm(expected.float())
    gate.check_close(what, error.item(), TOLERANCE.get(mode, QUANTIZED_TOLERANCE))
