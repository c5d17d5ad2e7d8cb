"""New token counts, batch sizes and table widths compile nothing: programs depend on layouts and static arguments."""

from __future__ import annotations

import itertools

import pytest
import torch

from kvq_core import kernels
from kvq_torch import KVCache, append_kv_, copy_pages_, gather_kv, mla_attention, paged_attention
from tests import compiling
from tests.compiling import TARGETS, KernelCall, record

SM_90 = TARGETS["sm_90"]
LAYOUT = compiling.layout("int8_per_token_head", 64)
MLA_LAYOUT = compiling.mla_layout("int8_per_token_head", 64)
COUNTS = [1, 2, 3, 15, 16, 17, 31, 32, 64, 100, 255, 256, 257, 300, 1000, 1024, 4096, 5000]
BATCHES = [1, 2, 7, 8, 16, 31, 64, 127, 128, 129, 256, 300]
WIDTHS = [1, 2, 16, 33, 512, 8192]
IN_GLUON = ["attend_mla_columns", "attend_mla_rows"]
KERNELS = [name for name in vars(kernels) if hasattr(getattr(kernels, name), "arg_names")] + IN_GLUON


def programs(launches) -> list[KernelCall]:
    """The distinct programs of ``launches``, in the order of their kernels' names."""
    return sorted({call for launch in launches for call in record(SM_90, launch)}, key=lambda call: call.kernel)


def kernels_of(launches) -> list[str]:
    return [call.kernel for call in programs(launches)]


def test_append_is_one_program_for_all_token_counts_and_pool_sizes():
    """And one that claims slots, for calls of many tokens."""
    launches = (compiling.append(LAYOUT, n, num_pages=p) for n, p in itertools.product(COUNTS, (1, 2, 64, 100)))
    assert kernels_of(launches) == ["append_kv", "claim_slots"]


def test_gather_is_one_program_for_all_batches_tables_and_pool_sizes():
    sizes = itertools.product(BATCHES, (1, 2, 33), (1, 64))
    assert kernels_of(compiling.gather(LAYOUT, b, w, num_pages=p) for b, w, p in sizes) == ["gather_kv"]


def test_copy_pages_is_one_program_for_all_numbers_of_pairs_and_pool_sizes():
    sizes = itertools.product(COUNTS, (1, 2, 64))
    assert kernels_of(compiling.copy(LAYOUT, n, num_pages=p) for n, p in sizes) == ["copy_pages"]


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (None, ["attend_segments", "merge_segments"]),
        (4, ["attend_segments", "merge_segments"]),
        (40, ["attend_queries"]),
    ],
)
def test_attention_is_one_program_for_all_batches_and_tables(queries, expected):
    sizes = itertools.product(BATCHES, WIDTHS)
    assert kernels_of(compiling.attention(LAYOUT, b, w, queries=queries) for b, w in sizes) == expected


@pytest.mark.parametrize(
    ("queries", "expected"),
    [
        (None, ["attend_mla_segments", "merge_segments"]),
        (4, ["attend_mla_segments", "merge_segments"]),
        (40, ["attend_mla_queries"]),
    ],
)
def test_mla_attention_is_one_program_for_all_batches_and_tables(queries, expected):
    sizes = itertools.product(BATCHES, WIDTHS)
    launches = (compiling.mla_attention(MLA_LAYOUT, b, w, queries=queries) for b, w in sizes)
    assert kernels_of(launches) == expected


@pytest.mark.parametrize(("mode", "kernel"), [("int8_per_token_head", "columns"), ("bfloat16", "rows")])
def test_mla_attention_of_many_heads_is_one_program_for_all_batches_and_tables(mode, kernel):
    layout = compiling.mla_layout(mode, page_size=64)
    launches = (compiling.mla_attention(layout, b, w, num_heads=128) for b, w in itertools.product(BATCHES, WIDTHS))
    assert kernels_of(launches) == [f"attend_mla_{kernel}", "merge_segments"]


def test_row_containers_are_one_program_for_all_sizes():
    rows = compiling.layout("int8_per_token_head", 64, scale_placement="row", row_order="NHD")
    launches = [compiling.append(rows, n, num_pages=p) for n, p in itertools.product(COUNTS, (1, 2, 64))]
    launches += [compiling.copy(rows, n, num_pages=p) for n, p in itertools.product(COUNTS, (1, 2, 64))]
    launches += [compiling.attention(rows, b, num_pages=p) for b, p in itertools.product(BATCHES, (1, 2, 64))]
    assert kernels_of(launches) == ["append_kv", "attend_segments", "claim_slots", "copy_pages", "merge_segments"]


def test_prefill_is_one_program_for_all_prompt_lengths():
    lengths = [n for n in COUNTS if n > 16]  # four heads a group: up to 16 queries of a sequence split the keys
    assert kernels_of(compiling.attention(LAYOUT, 2, queries=n) for n in lengths) == ["attend_queries"]


def test_prefill_through_a_library_is_one_program_for_all_prompt_lengths():
    lengths = [n for n in COUNTS if n <= 1024]
    assert kernels_of(compiling.library_prefill(LAYOUT, queries=n) for n in lengths) == ["finish_queries", "gather_kv"]


def test_scales_are_arrays_and_no_part_of_a_program(monkeypatch):
    layout = compiling.layout("fp8_e4m3/fp8_e5m2", 64)
    launches = [compiling.append(layout), compiling.gather(layout), compiling.attention(layout)]
    launches += [compiling.attention(layout, queries=40)]
    expected = programs(launches)
    monkeypatch.setattr(compiling, "SCALE", torch.full((), 0.013))
    assert programs(launches) == expected


def test_a_program_is_told_apart_by_what_it_is_compiled_for():
    """Or the tests above would hold for a record that forgets everything."""
    other = compiling.layout("fp8_per_token_head", 64)
    launches = [compiling.append(LAYOUT), compiling.append(other), compiling.append(LAYOUT, dtype=torch.float32)]
    assert kernels_of(launches) == ["append_kv"] * 3 + ["claim_slots"]


def _every_op(num_tokens: int, num_seqs: int, max_pages: int, num_pages: int) -> None:
    """Every op on the GPU, with arrays of these sizes and a layout that no other test has compiled for."""
    layout = compiling.layout("int8_per_token_head", 80)
    cache = KVCache(layout, num_pages, device="cuda")
    k = torch.zeros((num_tokens, layout.num_kv_heads, layout.head_dim), dtype=torch.bfloat16, device="cuda")
    append_kv_(cache, k, k, torch.arange(num_tokens, device="cuda"))
    pairs = torch.zeros(num_tokens, dtype=torch.int64, device="cuda")
    copy_pages_(cache, pairs, pairs - 1)
    page_table = torch.zeros((num_seqs, max_pages), dtype=torch.int32, device="cuda")
    seq_lens = torch.ones(num_seqs, dtype=torch.int32, device="cuda")
    gather_kv(cache, page_table, seq_lens)
    q = torch.zeros((num_seqs, 4 * layout.num_kv_heads, layout.head_dim), dtype=torch.bfloat16, device="cuda")
    paged_attention(q, cache, page_table, seq_lens)
    cu_seqlens_q = torch.arange(num_seqs + 1, dtype=torch.int32, device="cuda")
    paged_attention(q, cache, page_table, seq_lens, cu_seqlens_q=cu_seqlens_q)
    paged_attention(q, cache, page_table, seq_lens, cu_seqlens_q=cu_seqlens_q, max_seqlen_q=1, impl="sdpa")
    mla_cache = KVCache(compiling.mla_layout("int8_per_token_head", 80), num_pages, device="cuda")
    q = torch.zeros((num_seqs, 16, mla_cache.layout.head_dim), dtype=torch.bfloat16, device="cuda")
    mla_attention(q, mla_cache, page_table, seq_lens, sm_scale=0.1)
    mla_attention(q, mla_cache, page_table, seq_lens, sm_scale=0.1, cu_seqlens_q=cu_seqlens_q)
    for mode in ("int8_per_token_head", "bfloat16"):
        mla_cache = KVCache(compiling.mla_layout(mode, page_size=64), num_pages, device="cuda")
        q = torch.zeros((num_seqs, 40, mla_cache.layout.head_dim), dtype=torch.bfloat16, device="cuda")
        mla_attention(q, mla_cache, page_table, seq_lens, sm_scale=0.1)


@pytest.mark.gpu
def test_triton_compiles_nothing_for_new_counts():
    for kernel in KERNELS:
        getattr(kernels, kernel).device_caches.clear()
    _every_op(num_tokens=300, num_seqs=3, max_pages=5, num_pages=9)
    expected = _compiled_kernels()
    several = {"gather_kv": 2, "merge_segments": 4}  # for a library; of three kinds of latents
    if torch.cuda.get_device_capability() != (9, 0):
        several |= dict.fromkeys(IN_GLUON, 0) | {"attend_mla_segments": 3}
    assert expected == dict.fromkeys(KERNELS, 1) | several
    for sizes in ((1, 1, 1, 1), (16, 16, 16, 16), (257, 129, 64, 65), (5000, 300, 7, 400)):
        _every_op(*sizes)
        assert _compiled_kernels() == expected, sizes


def _compiled_kernels() -> dict[str, int]:
    """How many programs of each kernel Triton holds for the GPU."""
    device = torch.cuda.current_device()
    return {name: len(getattr(kernels, name).device_caches[device][0]) for name in KERNELS}
