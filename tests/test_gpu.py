"""What only a GPU shows: long contexts, large pools, wide tables, values that no one checked, memory never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvq_core import CacheLayout, MLALayout
from kvq_torch import KVCache, append_kv_, copy_pages_, gather_kv, mla_attention, paged_attention
from tests import backends, pools
from tests.case_types import AttentionCase
from tests.compare import assert_same_bytes

pytestmark = pytest.mark.gpu

QUANTIZED = ["fp8_e4m3", "fp8_e5m2", "fp8_per_token_head", "int8_per_token_head"]
PREFILL = {"cu_seqlens_q": [0, 70, 71], "max_seqlen_q": 70}


def attend(batch: pools.Batch, q: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return paged_attention(q, batch.cache, batch.page_table, batch.seq_lens, return_lse=True, **options)


def dense_attention(q, k, v, dtype: torch.dtype) -> torch.Tensor:
    """Attention of one query [num_q_heads, head_dim] over dense K and V, operands in ``dtype``, sums in float32.

    For float64 all of it is float64.
    """
    sums = torch.float64 if dtype == torch.float64 else torch.float32
    group = pools.NUM_Q_HEADS // pools.NUM_KV_HEADS
    q, k, v = (x.to(dtype).to(sums) for x in (q, k, v))
    q = q.unflatten(0, (pools.NUM_KV_HEADS, group))
    scores = torch.einsum("hgd,nhd->hgn", q, k) * pools.HEAD_DIM**-0.5
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = torch.einsum("hgn,nhd->hgd", weights.to(dtype).to(sums), v) / weights.sum(-1, keepdim=True)
    return out.flatten(0, 1).to(dtype)


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("mode", QUANTIZED)
def test_error_over_128k_keys_relative_to_naive_is_no_larger_than_over_1k(mode):
    """Sums in less than float32 would let it grow. float16 queries, so that rounding the result does not hide it."""
    ratios = []
    for num_keys in (1024, 131072):
        batch = pools.batch(pools.layout_of(mode), [num_keys])
        q = pools.values(1, pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=7, dtype=torch.float16)
        out, _ = attend(batch, q)
        k, v = (x[0, :num_keys] for x in gather_kv(batch.cache, batch.page_table, batch.seq_lens))
        exact = dense_attention(q[0], k, v, torch.float64)
        naive = error(dense_attention(q[0], k, v, torch.float16), exact)
        assert error(out[0], exact) <= 1.25 * naive + 2**-11
        ratios.append(error(out[0], exact) / naive)
    assert ratios[1] <= 1.25 * ratios[0]


@pytest.mark.parametrize("mode", ["bfloat16", *QUANTIZED])
def test_one_needle_among_131072_keys_is_found(mode):
    """One key that each query head matches, its weight near one among noise that adds up to a few percent."""
    num_keys, needle = 131072, 77777
    layout = pools.layout_of(mode)
    k, v, slots = pools.tokens(num_keys, seed=3)
    direction = pools.values(pools.NUM_KV_HEADS, pools.HEAD_DIM, seed=5, dtype=torch.float32)
    direction *= pools.HEAD_DIM**0.5 / direction.norm(dim=-1, keepdim=True)
    k[needle] = direction * 1.5
    cache = pools.poisoned_cache(layout, num_keys // pools.PAGE_SIZE)
    append_kv_(cache, k, v, slots)
    page_table = torch.arange(cache.num_pages, dtype=torch.int32, device="cuda")[None]
    q = direction.repeat_interleave(pools.NUM_Q_HEADS // pools.NUM_KV_HEADS, dim=0)[None].bfloat16()
    out = paged_attention(q, cache, page_table, pools.indices([num_keys]))
    out = out[0].float().unflatten(0, (pools.NUM_KV_HEADS, -1))
    nearest = torch.einsum("hgd,nhd->hgn", out, v.float()).argmax(-1)
    assert (nearest == needle).all()
    assert (out - v[needle].float()[:, None]).norm() < 0.1 * out.norm()


@pytest.mark.parametrize("options", [{}, {"cu_seqlens_q": [0, 8, 16], "max_seqlen_q": 8}, PREFILL])
def test_a_table_64_times_wider_changes_no_bit(options):
    batch = pools.batch(pools.layout_of("int8_per_token_head"), [1000, 4097])
    options = {name: pools.indices(x) if isinstance(x, list) else x for name, x in options.items()}
    q = pools.values(int(options.get("cu_seqlens_q", [2])[-1]), pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=7)
    num_seqs, width = batch.page_table.shape
    wide = torch.full((num_seqs, 64 * width), 2**31 - 1, dtype=torch.int32, device="cuda")
    wide[:, :width] = batch.page_table
    for got, want in zip(
        attend(batch._replace(page_table=wide), q, **options), attend(batch, q, **options), strict=True
    ):
        assert torch.equal(got, want)


def test_results_do_not_depend_on_the_other_sequences_of_a_ragged_batch():
    """Up to rounding: what a sequence's keys are split into depends on all lengths."""
    seq_lens = [1, 17, 5000, 3, 131, 40000, 2, 999]
    batch = pools.batch(pools.layout_of("int8_per_token_head"), seq_lens)
    q = pools.values(len(seq_lens), pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=7)
    together, _ = attend(batch, q)
    for seq in range(len(seq_lens)):
        alone = pools.Batch(batch.cache, batch.page_table[seq : seq + 1], batch.seq_lens[seq : seq + 1])
        out, _ = attend(alone, q[seq : seq + 1])
        assert error(out[0], together[seq].double()) <= 2**-8


@pytest.mark.parametrize("mode", ["int8_per_token_head", "fp8_per_token_head"])
def test_keys_never_written_are_zeros_however_many_a_program_meets(mode):
    """Their row scales are 0. 64 x 131072 of them are 32000 a program and more, all in one page."""
    num_seqs, num_keys, page_size = 64, 131072, 64
    page_table = torch.zeros((num_seqs, num_keys // page_size), dtype=torch.int32, device="cuda")
    seq_lens = pools.indices([num_keys] * num_seqs)
    for num_heads in (16, 64):
        cache = KVCache(MLALayout(mode, page_size=page_size), num_pages=1, device="cuda")
        q = pools.values(num_seqs, num_heads, 576, seed=7)
        out, lse = mla_attention(q, cache, page_table, seq_lens, sm_scale=0.1, return_lse=True)
        assert not out.any()
        assert torch.allclose(lse, torch.tensor(num_keys, device="cuda").log(), atol=1e-4)
    layout = CacheLayout(mode, page_size=page_size, num_kv_heads=8, head_dim=128)
    cache = KVCache(layout, num_pages=1, device="cuda")
    q = pools.values(num_seqs, 32, 128, seed=7)
    out, lse = paged_attention(q, cache, page_table, seq_lens, return_lse=True)
    assert not out.any()
    assert torch.allclose(lse, torch.tensor(num_keys, device="cuda").log(), atol=1e-4)


def test_pages_past_2_to_the_31_bytes_are_written_read_and_copied():
    layout = pools.layout_of("int8_per_token_head")
    num_pages = 3 * 2**30 // layout.page_bytes
    num_tokens = 3 * pools.PAGE_SIZE
    large = KVCache(layout, num_pages, device="cuda")
    small = KVCache(layout, 3, device="cuda")
    far = num_pages - 3
    new = pools.tokens(num_tokens, seed=1)
    append_kv_(small, *new)
    append_kv_(large, *new._replace(slots=new.slots + far * pools.PAGE_SIZE))
    assert torch.equal(large.pages[far:], small.pages)
    assert not large.pages[:far].any()

    near_table, far_table = pools.indices([[0, 1, 2]]), pools.indices([[far, far + 1, far + 2]])
    seq_lens = pools.indices([num_tokens])
    for got, want in zip(gather_kv(large, far_table, seq_lens), gather_kv(small, near_table, seq_lens), strict=True):
        assert torch.equal(got, want)
    for num_queries in (1, 40):
        q = pools.values(num_queries, pools.NUM_Q_HEADS, pools.HEAD_DIM, seed=7)
        queries = {"cu_seqlens_q": pools.indices([0, num_queries]), "max_seqlen_q": num_queries}
        got = paged_attention(q, large, far_table, seq_lens, **queries)
        assert torch.equal(got, paged_attention(q, small, near_table, seq_lens, **queries))

    copy_pages_(large, pools.indices([far + 2, far]), pools.indices([far - 1, 0]))
    assert torch.equal(large.pages[far - 1], small.pages[2])
    assert torch.equal(large.pages[0], small.pages[0])
    assert not large.pages[1 : far - 1].any()


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("one long", pools.layout_of("int8_per_token_head"), ((1, 40000),), group=4),
        AttentionCase("many ragged", pools.layout_of("fp8_per_token_head"), ((1, 7), (1, 9000), (1, 300)) * 7, group=4),
        AttentionCase("prefill", pools.layout_of("bfloat16"), ((300, 900), (1, 5000)), group=4, ragged=True),
    ],
    ids=lambda case: case.name,
)
def test_torch_and_jax_attend_with_equal_bits_over_long_contexts(case):
    inputs = case.inputs()
    torch_gpu, jax_gpu, *_ = backends.ON_GPU
    for got, want in zip(
        *(backend.attention(case.layout, inputs, case.options()) for backend in (jax_gpu, torch_gpu)), strict=True
    ):
        assert_same_bytes(np.asarray(got), np.asarray(want))


def test_hostile_values_never_fault():
    """In a process of its own: a fault would take every later test along."""
    report = run_hostile_calls([])
    assert report.returncode == 0, report.stdout + report.stderr


@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not on the PATH")
def test_compute_sanitizer_finds_no_access_outside_an_allocation():
    report = run_hostile_calls(["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "99"])
    output = report.stdout + report.stderr
    if "not supported" in output and report.returncode != 0:
        pytest.skip(f"compute-sanitizer cannot run here: {output[-300:]}")
    assert report.returncode == 0, output[-3000:]
    assert "ERROR SUMMARY: 0 errors" in output, output[-3000:]


def run_hostile_calls(prefix: list[str]) -> subprocess.CompletedProcess:
    # Without PyTorch's cache every tensor is an allocation of its own, so an access past its end is seen.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*prefix, sys.executable, "-m", "tests.sanitize"]
    root = Path(__file__).resolve().parent.parent
    return subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=400, check=False)
