"""PyTorch and JAX run one program: what jax-triton lowers without a GPU is the PTX of the torch path, to the byte."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import pytest
import torch

from kvq_core import CacheLayout, KVQuantMode, MLALayout
from kvq_jax import KVCache, _triton, append_kv, copy_pages, gather_kv, mla_attention, paged_attention
from kvq_jax._interop import target
from tests import compiling
from tests.compiling import TARGETS, compiled, record

MODES = [mode.value for mode in KVQuantMode]
MIXED = "fp8_per_token_head/bfloat16"
SM_90 = TARGETS["sm_90"]
NUM_PAGES = 64


class Call(NamedTuple):
    """One op on arrays that are only described, as both frameworks call it."""

    launch: Callable[[], Any]
    function: Callable[..., Any]  # of a cache and ``arrays``
    arrays: tuple[jax.ShapeDtypeStruct, ...]


def array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def append_call(cache: CacheLayout, num_tokens: int = 20, dtype: str = "bfloat16", num_pages: int = NUM_PAGES) -> Call:
    arrays = (
        array(dtype, num_tokens, cache.num_kv_heads, cache.head_dim),
        array(dtype, num_tokens, cache.num_kv_heads, cache.head_dim_v),
        array("int32", num_tokens),
    )
    launch = compiling.append(cache, num_tokens, getattr(torch, dtype), num_pages)
    return Call(launch, functools.partial(append_kv, impl="triton"), arrays)


def gather_call(cache: CacheLayout, num_seqs: int = 3, max_pages: int = 7, num_pages: int = NUM_PAGES) -> Call:
    arrays = array("int32", num_seqs, max_pages), array("int32", num_seqs)
    return Call(
        compiling.gather(cache, num_seqs, max_pages, num_pages=num_pages),
        functools.partial(gather_kv, impl="triton"),
        arrays,
    )


def copy_call(cache: CacheLayout, num_pairs: int = 3, num_pages: int = NUM_PAGES) -> Call:
    arrays = (array("int32", num_pairs),) * 2
    return Call(compiling.copy(cache, num_pairs, num_pages), functools.partial(copy_pages, impl="triton"), arrays)


def attention_call(
    cache: CacheLayout,
    num_seqs: int = 4,
    max_pages: int = 9,
    *,
    queries: int | None = None,
    dtype: str = "bfloat16",
    num_pages: int = NUM_PAGES,
    per_head: tuple[str, ...] = (),
    **options: Any,
) -> Call:
    num_q_heads = 32
    arrays = (
        array(dtype, num_seqs * (queries or 1), num_q_heads, cache.head_dim),
        array("int32", num_seqs, max_pages),
        array("int32", num_seqs),
    )
    if queries is not None:
        arrays += (array("int32", num_seqs + 1),)
    arrays += (array("float32", num_q_heads),) * len(per_head)

    def function(pages, q, page_table, seq_lens, *optional):
        names = ("cu_seqlens_q",) * (queries is not None) + per_head
        arguments = dict(zip(names, optional, strict=True)) | options
        return paged_attention(q, pages, page_table, seq_lens, max_seqlen_q=queries, impl="triton", **arguments)

    launch = compiling.attention(
        cache,
        num_seqs,
        max_pages,
        queries=queries,
        num_q_heads=num_q_heads,
        dtype=getattr(torch, dtype),
        num_pages=num_pages,
        **dict.fromkeys(per_head, torch.ones(num_q_heads)),
        **options,
    )
    return Call(launch, function, arrays)


def mla_call(
    cache: MLALayout, num_seqs: int = 4, max_pages: int = 9, *, queries: int | None = None, num_heads: int = 16
) -> Call:
    arrays = (
        array("bfloat16", num_seqs * (queries or 1), num_heads, cache.head_dim),
        array("int32", num_seqs, max_pages),
        array("int32", num_seqs),
    )
    if queries is not None:
        arrays += (array("int32", num_seqs + 1),)

    def function(pages, q, page_table, seq_lens, cu_seqlens_q=None):
        options = {"cu_seqlens_q": cu_seqlens_q, "max_seqlen_q": queries, "sm_scale": 0.1, "impl": "triton"}
        return mla_attention(q, pages, page_table, seq_lens, **options)

    return Call(
        compiling.mla_attention(cache, num_seqs, max_pages, queries=queries, num_heads=num_heads), function, arrays
    )


def lowered(
    call: Call, cache: CacheLayout | MLALayout, num_pages: int = NUM_PAGES, donate: bool = False
) -> jax.stages.Lowered:
    """``call`` lowered for CUDA."""
    abstract = KVCache(array("uint8", *cache.shape(num_pages)), array("float32"), array("float32"), cache)

    def function(*args):  # one of its own, because jax.jit caches traces by function
        return call.function(*args)

    with target(SM_90.device):
        traced = jax.jit(function, donate_argnums=0 if donate else ()).trace(abstract, *call.arrays)
        return traced.lower(lowering_platforms=("cuda",))


@pytest.fixture
def jax_programs(monkeypatch):
    """The (kernel, PTX) pairs that the JAX path compiles during the test, in order."""
    triton_lib = _triton._jax_triton().triton_lib
    programs, kernel = [], triton_lib.triton_kernel_call_lib.TritonKernel

    def keep(name, num_warps, num_ctas, shared_bytes, ptx, *rest):
        programs.append((name, ptx))
        return kernel(name, num_warps, num_ctas, shared_bytes, ptx, *rest)

    _triton._kernel_call.cache_clear()
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    monkeypatch.setattr(triton_lib.triton_kernel_call_lib, "TritonKernel", keep)
    return programs


def assert_same_programs(call: Call, cache: CacheLayout | MLALayout, jax_programs: list) -> None:
    lowered(call, cache)
    torch_calls = record(SM_90, call.launch)
    assert [name for name, _ in jax_programs] == [torch_call.kernel for torch_call in torch_calls]
    for (name, ptx), torch_call in zip(jax_programs, torch_calls, strict=True):
        assert ptx == compiled(torch_call, SM_90.gpu).asm["ptx"], f"the PTX of {name} differs"


@pytest.mark.parametrize("mode", [*MODES, MIXED])
def test_append_and_gather_are_the_same_programs_in_every_mode(mode, jax_programs):
    cache = compiling.layout(mode, 64)
    for call in (append_call(cache), gather_call(cache)):
        jax_programs.clear()
        assert_same_programs(call, cache, jax_programs)


@pytest.mark.parametrize("make_call", [functools.partial(append_call, num_tokens=300, dtype="float32"), copy_call])
def test_claims_of_slots_and_copies_are_the_same_programs(make_call, jax_programs):
    cache = compiling.layout("int8_per_token_head", 64)
    assert_same_programs(make_call(cache), cache, jax_programs)


@pytest.mark.parametrize("queries", [None, 100])
@pytest.mark.parametrize("mode", ["bfloat16", "fp8_e5m2", "int8_per_token_head", MIXED])
def test_attention_is_the_same_program(mode, queries, jax_programs):
    cache = compiling.layout(mode, 64)
    assert_same_programs(attention_call(cache, queries=queries), cache, jax_programs)


@pytest.mark.parametrize(("queries", "num_heads"), [(None, 16), (None, 128), (100, 16)])
@pytest.mark.parametrize("mode", ["bfloat16", "fp8_e4m3", "int8_per_token_head"])
def test_mla_attention_is_the_same_program(mode, queries, num_heads, jax_programs):
    cache = compiling.mla_layout(mode, 64)
    assert_same_programs(mla_call(cache, queries=queries, num_heads=num_heads), cache, jax_programs)


@pytest.mark.parametrize(
    ("mode", "num_heads", "kernel"),
    [("bfloat16", 128, "rows"), ("int8_per_token_head", 128, "columns"), ("fp8_e4m3", 16, "columns")],
)
def test_mla_attention_of_task_groups_is_the_same_program(mode, num_heads, kernel, jax_programs):
    cache = compiling.mla_layout(mode, page_size=64)
    assert_same_programs(mla_call(cache, num_heads=num_heads), cache, jax_programs)
    assert jax_programs[0][0] == f"attend_mla_{kernel}"


@pytest.mark.parametrize("row_order", ["HND", "NHD"])
def test_row_containers_have_the_same_programs(row_order, jax_programs):
    cache = compiling.layout("int8_per_token_head", 64, scale_placement="row", row_order=row_order)
    for call in (append_call(cache), gather_call(cache), copy_call(cache), attention_call(cache)):
        jax_programs.clear()
        assert_same_programs(call, cache, jax_programs)


def test_a_transposed_view_is_the_program_of_the_other_order():
    """What torch calls HND with the strides of NHD is what JAX, whose arrays have no strides, must call NHD."""
    slots_first = compiling.layout("int8_per_token_head", 64, scale_placement="row", row_order="NHD")
    heads_first = compiling.layout("int8_per_token_head", 64, scale_placement="row")
    _, page_size, num_kv_heads, row_bytes = slots_first.shape(1)
    page_bytes = page_size * num_kv_heads * row_bytes
    strides = (page_bytes, row_bytes, num_kv_heads * row_bytes, 1)
    for launch in (compiling.append, compiling.gather, compiling.copy, compiling.attention):
        assert record(SM_90, launch(heads_first, strides=strides)) == record(SM_90, launch(slots_first))


def test_attention_with_every_argument_is_the_same_program(jax_programs):
    cache = compiling.layout("int8_per_token_head", 64, head_dim_v=32)
    numbers = {"window": 40, "softcap": 20.0, "sm_scale": 0.3, "causal": False}
    call = attention_call(cache, queries=4, per_head=("sinks", "alibi_slopes"), **numbers)
    assert_same_programs(call, cache, jax_programs)


def test_counts_of_one_are_not_folded_into_the_program(jax_programs):
    """jax-triton makes constants of scalars that equal 1, which torch does not: one program would become two."""
    cache = compiling.layout("int8_per_token_head", 64)
    compiled_kernels = []
    for counts in (1, 5):
        for call in (
            append_call(cache, counts, num_pages=counts),
            gather_call(cache, counts, counts, num_pages=counts),
            copy_call(cache, counts, num_pages=counts),
            attention_call(cache, counts, counts, num_pages=counts),
        ):
            lowered(call, cache, num_pages=counts)
        compiled_kernels.append([name for name, _ in jax_programs])
    assert compiled_kernels[0] == ["append_kv", "gather_kv", "copy_pages", "attend_segments", "merge_segments"]
    assert compiled_kernels[1] == compiled_kernels[0]


def test_a_donated_append_is_lowered_to_an_update_in_place():
    cache = compiling.layout("int8_per_token_head", 64)
    text = re.sub(r'backend_config = "[^"]*"', "", lowered(append_call(cache), cache, donate=True).as_text())
    pool = f"tensor<{'x'.join(map(str, cache.shape(NUM_PAGES)))}xui8>"
    (main,) = re.findall(r"func.func public @main\((.*?)\) ->", text)
    assert re.search(rf"%arg0: {pool} {{[^}}]*tf.aliasing_output = 0", main), main
    makers = [line for line in text.splitlines() if re.search(rf"-> {pool}$", line)]
    assert len(makers) == 1, makers
    assert "output_operand_alias<output_tuple_indices = [], operand_index = 6," in makers[0]
    assert "@triton_kernel_call_ffi" in makers[0]


def test_an_append_in_a_scan_carries_the_pool_without_a_copy():
    cache = compiling.layout("int8_per_token_head", 64)

    def function(pages, *steps):
        def body(carry, token):
            return append_kv(carry, *token, impl="triton"), None

        return jax.lax.scan(body, pages, steps)[0]

    single = append_call(cache, num_tokens=1)
    steps = tuple(array(x.dtype, 5, *x.shape) for x in single.arrays)
    text = lowered(Call(single.launch, function, steps), cache, donate=True).as_text()
    pool = f"tensor<{'x'.join(map(str, cache.shape(NUM_PAGES)))}xui8>"
    assert not re.findall(rf"stablehlo\.(?!custom_call|while|return)\w+ .*{pool}", text)
    assert "operand_index = 6," in text
