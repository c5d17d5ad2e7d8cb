"""MLA decoding through kvq_torch, and through FlashInfer in bfloat16 in the same run.

A call reads five times what the L2 of an H200 holds or more, so that one pool is cold enough.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

import kvq_torch
from bench import gate, peers, pools, tables
from bench.cases import BF16, MLACase
from bench.rows import FLASHINFER, TORCH, Row
from bench.timing import Call, device_time

TOLERANCE = 4e-3  # a rounding of probabilities and one of the results, in bfloat16


def measure(case: MLACase, with_peers: bool) -> Iterator[Row]:
    """Rows of ``case``: kvq in each of its modes, then FlashInfer.

    Raises:
        RedGateError: a result is wrong.
    """
    shape = (case.batch, case.num_heads, case.layout(BF16).head_dim)
    q = torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    table = torch.from_numpy(tables.page_table(case.as_decode())).cuda()
    seq_lens = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
    expected = None
    for mode in case.modes:
        cache = pools.mla_cache(case, mode)
        call = functools.partial(kvq_torch.mla_attention, q, cache, table, seq_lens, sm_scale=case.sm_scale)
        out = _check(case, mode, call, q, cache, table, seq_lens)
        expected = out if mode == BF16 else expected
        yield _row(case, TORCH, mode, call)
        del cache, call
    if with_peers:
        call = peers.mla_call(case, q)
        if expected is not None:
            error = torch.linalg.vector_norm(call().float() - expected.float()) / expected.float().norm()
            gate.check_close(f"FlashInfer, {case.name}", error.item(), peers.TOLERANCE[BF16])
        yield _row(case, FLASHINFER, BF16, call)


def _row(case: MLACase, impl: str, mode: str, call: Call) -> Row:
    is_peer = impl == FLASHINFER
    return Row(
        "mla",
        case.name,
        impl,
        mode,
        device_time([call]),
        case.shape(),
        case.num_bytes(mode),
        case.num_flops,
        None if is_peer else (case.name, FLASHINFER, BF16),
        None if is_peer else case.bar_of(mode),
    )


def _check(
    case: MLACase,
    mode: str,
    call: Call,
    q: torch.Tensor,
    cache: kvq_torch.KVCache,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
) -> torch.Tensor:
    """Hold the first and the last sequence against the eager path in float32; return the values."""
    out, ends = call(), slice(None, None, case.batch - 1)
    where = cache, page_table[ends].contiguous(), seq_lens[ends].contiguous()
    want = kvq_torch.mla_attention(q[ends].float(), *where, sm_scale=case.sm_scale, impl="eager")
    error = torch.linalg.vector_norm(out[ends].float() - want) / torch.linalg.vector_norm(want)
    gate.check_close(f"full size, {case.name} {mode}", error.item(), TOLERANCE)
    return out
