"""kvq_jax: what is particular to JAX. Bytes and accuracy of every case and backend are tested elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import subprocess
import sys
import textwrap
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kvq_core import CacheLayout, KVQuantMode, codec, reference
from kvq_core.plan import DeviceFacts
from kvq_jax import KVCache, _codec, _triton, append_kv, copy_pages, gather_kv, paged_attention
from kvq_jax._interop import target

H200 = DeviceFacts("cuda", 90, 132)
INT8 = CacheLayout("int8_per_token_head", page_size=4, num_kv_heads=2, head_dim=16)


def make_cache(layout: CacheLayout = INT8, num_pages: int = 6) -> KVCache:
    """A cache of poisoned pages: whatever is read but was not written shows."""
    return KVCache.create(layout, pages=np.full(layout.shape(num_pages), 0xFF, np.uint8))


def make_rows(num_tokens: int, layout: CacheLayout = INT8, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (num_tokens, layout.num_kv_heads)
    k = rng.standard_normal((*shape, layout.head_dim)).astype(ml_dtypes.bfloat16)
    v = rng.standard_normal((*shape, layout.head_dim_v)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)


def reference_pages(cache: KVCache, k: jax.Array, v: jax.Array, slots: Any) -> np.ndarray:
    pages = np.array(cache.pages)
    scales = np.asarray(cache.k_scale), np.asarray(cache.v_scale)
    reference.append_kv(cache.layout, pages, np.asarray(k), np.asarray(v), np.asarray(slots), *scales)
    return pages


def lower_for_cuda(f, *args, **jit_options) -> str:
    with target(H200):
        lowered = jax.jit(f, **jit_options).trace(*args).lower(lowering_platforms=("cuda",))
    return re.sub(r'backend_config = "(\\.|[^"\\])*"', "", lowered.as_text())


def run_python(program: str, **env: str) -> str:
    """Run a program in a process of its own, warnings as errors; return what it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_CACHE_DIR", "XLA_FLAGS")}
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    result = subprocess.run(command, env=inherited | env, cwd=root, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


def edge_rows(dtype: str) -> np.ndarray:
    """Rows ``[n, 16]`` of every pattern of a 16-bit dtype, in order and shuffled; for float32, of what is hard."""
    rng = np.random.default_rng(0)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    if dtype != "float32":
        values = np.concatenate([patterns, rng.permutation(patterns)])
        return values.view(np.dtype(dtype)).reshape(-1, 16)
    high = patterns.astype(np.uint32) << 16
    around_ties = [high | low for low in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]  # of bfloat16 and beyond
    subnormals = rng.integers(0, 1 << 23, 1 << 12, dtype=np.uint32)
    of_float16 = (
        patterns.view(np.float16).astype(np.float32).view(np.uint32)[:, None] + np.array([0, 4096, 4097])
    ).ravel()
    mantissas = rng.integers(0, 1 << 32, 1 << 16, dtype=np.uint32)
    bits = np.concatenate([*around_ties, subnormals, of_float16.astype(np.uint32), mantissas])
    amplitudes = np.float32(10) ** rng.uniform(-9, 6, (4096, 1)).astype(np.float32)
    ordinary = rng.standard_normal((4096, 16)).astype(np.float32) * amplitudes
    return np.concatenate([bits.view(np.float32).reshape(-1, 16), ordinary])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("mode", KVQuantMode)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_xla_codec_writes_the_bytes_of_numpy_for_every_pattern(wrap, mode, dtype):
    x = edge_rows(dtype)
    for scale in (1.0, 0.013, 1e-30, 1e30) if mode.is_per_tensor else (1.0,):
        codes, scales = codec.encode_rows(x, mode, scale)
        encode = wrap(functools.partial(_codec.encode_rows, mode=mode))
        jax_codes, jax_scales = encode(jnp.asarray(x), tensor_scale=jnp.float32(scale))
        np.testing.assert_array_equal(np.asarray(jax_codes), codes.view(np.uint8))
        if scales is not None:
            np.testing.assert_array_equal(np.asarray(jax_scales), scales[:, None].view(np.uint8))


@pytest.mark.parametrize("mode", KVQuantMode)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_xla_codec_reads_the_values_of_numpy_for_every_code(wrap, mode):
    itemsize = mode.code_dtype.itemsize
    patterns = np.arange(1 << 8 if itemsize == 1 else 1 << 16).astype(f"u{itemsize}")
    codes = (patterns << 16 if itemsize == 4 else patterns).view(np.uint8).reshape(-1, 16 * itemsize)
    scales = np.full(len(codes) if mode.is_per_token_head else (), 0.37, np.float32)
    values = codec.decode_rows(codes.view(mode.code_dtype), mode, scales)
    jax_scales = jnp.asarray(scales[:, None].view(np.uint8) if mode.is_per_token_head else scales)
    jax_values = np.asarray(
        wrap(functools.partial(_codec.decode_rows, mode=mode))(jnp.asarray(codes), scales=jax_scales)
    )
    np.testing.assert_array_equal(np.isnan(jax_values), np.isnan(values))
    is_number = ~np.isnan(values)
    np.testing.assert_array_equal(jax_values.view(np.uint32)[is_number], values.view(np.uint32)[is_number])


def test_append_drops_padding_and_slots_past_the_pool_and_keeps_one_of_equal_slots_whole():
    cache, (k, v) = make_cache(), make_rows(7)
    slots = jnp.array([0, -1, 5, 24, 5, -(2**31), 2**31 - 1], jnp.int32)
    pages = append_kv(cache, k, v, slots).pages
    kept = jnp.array([0, 4])
    np.testing.assert_array_equal(np.asarray(pages), reference_pages(cache, k[kept], v[kept], slots[kept]))


def test_numpy_slots_that_int32_cannot_hold_are_dropped_not_wrapped():
    cache, (k, v) = make_cache(), make_rows(2)
    pages = append_kv(cache, k, v, np.array([2**32, -(2**32) + 1])).pages
    np.testing.assert_array_equal(np.asarray(pages), np.asarray(cache.pages))


def test_int64_slots_and_pages_work_with_x64():
    cache, (k, v) = make_cache(), make_rows(3)
    with jax.enable_x64(True):
        slots = jnp.array([2**32, 3, 9])
        assert slots.dtype == jnp.int64
        new = copy_pages(append_kv(cache, k, v, slots), jnp.array([0, 2**32]), jnp.array([5, 4]))
    pages = reference_pages(cache, k[1:], v[1:], np.array([3, 9]))
    pages[5] = pages[0]
    np.testing.assert_array_equal(np.asarray(new.pages), pages)


def test_append_in_scan_with_the_cache_as_carry_equals_one_append():
    cache, (k, v) = make_cache(), make_rows(8)
    slots = jnp.array([8, 9, 10, 11, 20, 21, 22, 23])

    def step(cache, token):
        k, v, slot = token
        return append_kv(cache, k[None], v[None], slot[None]), None

    scanned, _ = jax.jit(lambda cache: jax.lax.scan(step, cache, (k, v, slots)))(cache)
    np.testing.assert_array_equal(np.asarray(scanned.pages), reference_pages(cache, k, v, slots))


def test_donated_append_keeps_the_buffer():
    cache, (k, v) = make_cache(), make_rows(3)
    address = cache.pages.unsafe_buffer_pointer()
    append = jax.jit(append_kv, donate_argnums=0)
    for step in range(3):
        cache = append(cache, k, v, jnp.arange(3) + 3 * step)
    assert cache.pages.unsafe_buffer_pointer() == address


def test_cache_is_a_pytree_that_survives_placeholders():
    cache = make_cache()
    leaves, treedef = jax.tree.flatten(cache)
    assert len(leaves) == 3
    assert jax.tree.map(lambda _: None, cache).layout is cache.layout
    assert jax.tree.unflatten(treedef, ["pages", "k_scale", "v_scale"]).k_scale == "k_scale"
    assert jax.eval_shape(lambda cache: cache, cache).pages.shape == cache.pages.shape
    assert jax.tree.structure(dataclasses.replace(cache, k_scale=jnp.float32(2))) == treedef


def test_cache_owns_its_scales():
    scale = jnp.float32(0.5)
    cache = KVCache.create(
        CacheLayout("fp8", page_size=4, num_kv_heads=1, head_dim=16), 1, k_scale=scale, v_scale=scale
    )
    jax.jit(lambda cache: cache, donate_argnums=0)(cache)
    assert float(scale) == 0.5


@pytest.mark.parametrize(("placement", "order"), [("tail", ""), ("row", "-NHD")])
def test_shard_map_over_kv_heads_gives_the_bytes_and_outputs_of_one_device(placement, order):
    run_python(
        """
        import os, jax, jax.numpy as jnp, numpy as np
        from jax.sharding import NamedSharding, PartitionSpec as P
        from kvq_core import CacheLayout
        from kvq_jax import KVCache, append_kv, gather_kv, paged_attention

        layout = CacheLayout.from_fingerprint(os.environ["FINGERPRINT"])
        mesh = jax.make_mesh((2,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
        rng = np.random.default_rng(0)
        k, v = (jnp.asarray(rng.standard_normal((3, 4, 16)), jnp.float32) for _ in range(2))
        q = jnp.asarray(rng.standard_normal((3, 8, 16)), jnp.float32)
        table, lens = jnp.array([[2], [0]], jnp.int32), jnp.array([2, 1], jnp.int32)

        def steps(cache, q, k, v):
            def step(cache, slots):
                cache = append_kv(cache, k, v, slots)
                return cache, paged_attention(q, cache, table, lens, cu_seqlens_q=jnp.array([0, 2, 3], jnp.int32))
            cache, outs = jax.lax.scan(step, cache, jnp.array([[8, 9, 0], [8, 9, 0]]))
            return cache, outs, gather_kv(cache, table, lens)[0]

        expected = jax.jit(steps)(KVCache.create(layout, 3), q, k, v)
        pool = P(*("tp" if axis == layout.head_axis else None for axis in range(len(layout.axes))))
        cache = KVCache.create(layout, 3, sharding=NamedSharding(mesh, pool))
        assert len(cache.pages.sharding.device_set) == 2
        heads = P(None, "tp")
        specs = KVCache(pool, P(), P(), layout)
        for check_vma in (True, False):
            sharded = jax.shard_map(
                steps, mesh=mesh, in_specs=(specs, heads, heads, heads), check_vma=check_vma,
                out_specs=(specs, P(None, None, "tp"), P(None, None, "tp")),
            )
            got = jax.jit(sharded)(cache, q, k, v)
            np.testing.assert_array_equal(np.asarray(got[0].pages), np.asarray(expected[0].pages))
            np.testing.assert_allclose(np.asarray(got[1]), np.asarray(expected[1]), rtol=1e-6, atol=1e-6)
            np.testing.assert_array_equal(np.asarray(got[2]), np.asarray(expected[2]))
        """,
        FINGERPRINT=f"kvq1-{placement}-k:int8_per_token_head-v:fp8_e4m3-p4-h4-dk16-dv16{order}",
        XLA_FLAGS="--xla_force_host_platform_device_count=2",
        JAX_PLATFORMS="cpu",
    )


def test_cuda_append_is_one_custom_call_that_aliases_the_donated_pool():
    cache, (k, v) = make_cache(), make_rows(3)
    text = lower_for_cuda(lambda *args: append_kv(*args), cache, k, v, jnp.arange(3), donate_argnums=0)
    pool = "tensor<6x2x160xui8>"
    assert re.search(r"%arg0: " + pool + r" \{[^}]*(tf.aliasing_output|jax.buffer_donor)", text)
    operations = re.findall(r"%\d+ = \"?(\w+\.\w+)", text)
    assert operations == ["stablehlo.custom_call"]
    call = next(line for line in text.splitlines() if "custom_call" in line)
    (operands,) = re.findall(r"@triton_kernel_call_ffi\(([^)]*)\)", call)
    (aliased,) = re.findall(r"output_tuple_indices = \[\], operand_index = (\d+)", call)
    assert operands.split(", ")[int(aliased)] == "%arg0"


def test_cuda_copy_pages_aliases_the_donated_pool_in_scan():
    def copy_twice(cache, src, dst):
        return jax.lax.scan(lambda cache, _: (copy_pages(cache, src, dst), None), cache, length=2)[0]

    text = lower_for_cuda(copy_twice, make_cache(), jnp.arange(1), jnp.arange(1) + 1, donate_argnums=0)
    assert text.count("output_operand_alias<") == 1
    assert "stablehlo.concatenate" not in text
    assert "dynamic_update_slice" not in text


def test_cuda_ops_lower_inside_shard_map():
    mesh = jax.make_mesh((1,), ("tp",), axis_types=(jax.sharding.AxisType.Auto,))
    cache, (k, v) = make_cache(), make_rows(2)
    heads: Any = jax.P(None, "tp")
    none: Any = jax.P()
    specs = KVCache(heads, none, none, INT8)

    def step(cache, k, v, table):
        cache, _ = jax.lax.scan(lambda cache, _: (append_kv(cache, k, v, jnp.arange(2)), None), cache, length=2)
        return cache, gather_kv(cache, table, jnp.full(1, 2, jnp.int32))[0]

    sharded = jax.shard_map(
        step, mesh=mesh, in_specs=(specs, heads, heads, none), out_specs=(specs, jax.P(None, None, "tp"))
    )
    assert lower_for_cuda(sharded, cache, k, v, jnp.zeros((1, 1), jnp.int32)).count("@triton_kernel_call_ffi") == 2


def test_cuda_attention_lowers_without_a_host_read():
    cache, q = make_cache(), jnp.zeros((3, 4, 16), jnp.bfloat16)

    def attend(q, cache, table, lens, cu):
        return paged_attention(q, cache, table, lens, cu_seqlens_q=cu, max_seqlen_q=2, return_lse=True)

    table, lens, cu = jnp.zeros((2, 3), jnp.int32), jnp.ones(2, jnp.int32), jnp.array([0, 2, 3], jnp.int32)
    assert "@triton_kernel_call_ffi" in lower_for_cuda(attend, q, cache, table, lens, cu)


def test_a_scalar_equal_to_one_does_not_compile_the_kernel_again():
    from jax_triton import triton_lib

    _triton._kernel_call.cache_clear()
    cache = make_cache()
    compiled = []
    for num_tokens in (1, 2, 17):
        k, v = make_rows(num_tokens)
        lower_for_cuda(lambda *args: append_kv(*args), cache, k, v, jnp.arange(num_tokens))
        compiled.append(len(triton_lib._COMPILED_KERNEL_CACHE))
    assert compiled[0] == compiled[-1]


@pytest.mark.parametrize("before", [None, "/tmp/kvq-test-triton-cache"])
def test_triton_compiles_outside_jax_after_kvq_jax_launched(before):
    """jax_triton sets TRITON_CACHE_DIR to "", after which triton.compile, hence PyTorch, finds no cache directory."""
    program = """
        import os, sys
        before = os.environ.get("TRITON_CACHE_DIR")
        import kvq_jax
        assert not {"jax_triton", "triton", "torch"} & set(sys.modules), "imported too early"
        import jax, jax.numpy as jnp
        from kvq_core import CacheLayout
        from kvq_core.plan import DeviceFacts
        from kvq_jax._interop import target
        cache = kvq_jax.KVCache.create(CacheLayout("fp8", page_size=4, num_kv_heads=2, head_dim=16), 2)
        with target(DeviceFacts("cuda", 90, 132)):
            pages = jnp.arange(1)
            jax.jit(kvq_jax.copy_pages).trace(cache, pages, pages).lower(lowering_platforms=("cuda",))
        assert "jax_triton" in sys.modules
        assert os.environ.get("TRITON_CACHE_DIR") == before

        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
        from kvq_core import kernels
        types = ("*i32", "i32", "i32", "*i32", "constexpr")
        signature = dict(zip(kernels.claim_slots.arg_names, types, strict=True))
        source = ASTSource(kernels.claim_slots, signature, {"TOKENS": 16})
        assert "ptx" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm
        """
    run_python(program, **({} if before is None else {"TRITON_CACHE_DIR": before}), JAX_PLATFORMS="cpu")


def test_padded_query_rows_are_zero_with_minus_infinity():
    cache, (k, v) = make_cache(), make_rows(3)
    cache = append_kv(cache, k, v, jnp.arange(3))
    q = jnp.ones((5, 2, 16), jnp.float32)
    attend = jax.jit(functools.partial(paged_attention, return_lse=True, sinks=jnp.ones(2)))
    cu = jnp.array([0, 2], jnp.int32)
    out, lse = attend(q, cache, jnp.zeros((1, 1), jnp.int32), jnp.array([3], jnp.int32), cu_seqlens_q=cu)
    assert np.isfinite(lse[:2]).all()
    assert (np.asarray(out[2:]) == 0).all()
    assert np.isneginf(lse[2:]).all()


def test_only_queries_that_see_a_nan_row_get_nan():
    layout = CacheLayout("bfloat16", page_size=4, num_kv_heads=1, head_dim=16)
    cache = make_cache(layout)
    k, v = make_rows(6, layout)
    k, v = k.at[2].set(jnp.nan), v.at[4].set(jnp.nan)
    cache = append_kv(cache, k, v, jnp.arange(6))
    q = jnp.ones((6, 1, 16), jnp.float32)
    cu, table, lens = jnp.array([0, 6], jnp.int32), jnp.array([[0, 1, 99]], jnp.int32), jnp.array([6], jnp.int32)
    out, lse = paged_attention(q, cache, table, lens, cu_seqlens_q=cu, window=2, return_lse=True)
    assert np.isnan(out).any(axis=(1, 2)).tolist() == [False, False, True, True, True, True]
    assert np.isnan(lse).any(axis=1).tolist() == [False, False, True, True, False, False]


def test_xla_attention_of_2048_queries_and_keys_stays_below_256_megabytes():
    layout = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)
    shapes = (
        jax.ShapeDtypeStruct((2048, 8, 128), jnp.bfloat16),
        jax.eval_shape(lambda: KVCache.create(layout, 128)),
        jax.ShapeDtypeStruct((1, 128), jnp.int32),
        jax.ShapeDtypeStruct((1,), jnp.int32),
    )
    attend = jax.jit(functools.partial(paged_attention, impl="xla"))
    compiled = attend.lower(*shapes, cu_seqlens_q=jax.ShapeDtypeStruct((2,), jnp.int32)).compile()
    analysis: Any = compiled.memory_analysis()
    assert analysis.temp_size_in_bytes < 256 << 20


def test_empty_calls_return_empty_or_unchanged_results():
    cache, (k, v) = make_cache(), make_rows(0)
    none = jnp.zeros(0, jnp.int32)
    for impl in ("xla", "triton"):
        context = target(H200) if impl == "triton" else contextlib.nullcontext()
        with context:
            assert append_kv(cache, k, v, none, impl=impl).pages is cache.pages or impl == "xla"
            assert copy_pages(cache, none, none, impl=impl).pages.shape == cache.pages.shape
            table = jnp.zeros((0, 3), jnp.int32)
            assert gather_kv(cache, table, none, impl=impl)[0].shape == (0, 12, 2, 16)
            out, lse = paged_attention(jnp.zeros((0, 4, 16)), cache, table, none, return_lse=True, impl=impl)
            assert (out.shape, lse.shape) == ((0, 4, 16), (0, 4))


def test_reading_from_a_pool_without_pages_gives_nan():
    cache = KVCache.create(INT8, 0)
    k, v = make_rows(1)
    cache = append_kv(cache, k, v, jnp.arange(1))
    table, lens = jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32)
    assert np.isnan(gather_kv(cache, table, lens)[0][0, 0]).all()
    assert np.isnan(paged_attention(jnp.ones((1, 2, 16)), cache, table, lens)).all()


def test_an_explicit_impl_never_falls_back(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    cache, (k, v) = make_cache(), make_rows(1)
    call = functools.partial(append_kv, cache, k, v, jnp.arange(1))
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        call(impl="triton")
    for impl in ("cudnn", "pallas"):
        with pytest.raises(NotImplementedError, match=impl):
            call(impl=impl)
    with pytest.raises(ValueError, match=r"'triton', 'cudnn', 'pallas', 'xla'"):
        call(impl="eager")


def test_xla_on_a_gpu_reads_quantized_pages_but_refuses_to_write_them():
    cache, (k, v) = make_cache(), make_rows(1)
    with target(H200):
        with pytest.raises(NotImplementedError, match="divides approximately"):
            append_kv(cache, k, v, jnp.arange(1), impl="xla")
        gather_kv(cache, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), impl="xla")


def test_bad_arguments_raise_before_anything_is_written():
    cache, (k, v) = make_cache(), make_rows(2)
    slots: Any = [0, 1]
    with pytest.raises(TypeError, match=r"slot_mapping.*jnp.asarray"):
        append_kv(cache, k, v, slots)
    with pytest.raises(ValueError, match="num_kv_heads=2"):
        append_kv(cache, k[:, :1], v, jnp.arange(2))
    with pytest.raises(TypeError, match="float16"):
        gather_kv(cache, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, jnp.int32), dtype=jnp.int8)
    with pytest.raises(TypeError, match="window"):
        jax.jit(
            lambda w: paged_attention(
                jnp.ones((1, 2, 16)), cache, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, int), window=w
            )
        )(3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({}, "either num_pages"),
        ({"num_pages": 1, "pages": np.zeros((1, 2, 160), np.uint8)}, "either num_pages"),
        ({"num_pages": -1}, "num_pages to be an integer"),
        ({"num_pages": 2.0}, "num_pages to be an integer"),
        ({"pages": np.zeros((1, 1, 160), np.uint8)}, r"layout.shard\(n\)"),
        ({"pages": np.zeros((1, 2, 160), np.int8)}, "uint8"),
        ({"pages": np.zeros((1, 2, 4, 40), np.uint8)}, r"\[num_pages, num_kv_heads=2, record_bytes=160\]"),
        ({"num_pages": 1, "k_scale": np.ones(2)}, "k_scale to be one number"),
    ],
)
def test_create_says_what_is_wrong(arguments, error):
    with pytest.raises((ValueError, TypeError), match=error):
        KVCache.create(INT8, **arguments)


@pytest.mark.parametrize("impl", ["xla", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_vmap_is_one_call_after_another(impl):
    table, lens = jnp.array([[2, 0]], jnp.int32), jnp.array([2], jnp.int32)
    k, _ = make_rows(6)
    q = jnp.asarray(np.random.default_rng(1).standard_normal((3, 1, 4, 16)), jnp.bfloat16)

    def step(q, rows):
        cache = append_kv(make_cache(), rows, rows, jnp.array([8, 9]), impl=impl)
        return cache.pages, paged_attention(q, cache, table, lens, impl=impl)

    rows = k.reshape(3, 2, *k.shape[1:])
    together = jax.vmap(step)(q, rows)
    for i in range(3):
        for got, want in zip(together, step(q[i], rows[i]), strict=True):
            np.testing.assert_array_equal(np.asarray(got[i]), np.asarray(want))


def test_cuda_vmap_loops_over_one_kernel():
    q, table, lens = jnp.zeros((3, 1, 4, 16), jnp.bfloat16), jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
    cache = make_cache()
    text = lower_for_cuda(jax.vmap(lambda q: paged_attention(q, cache, table, lens)), q)
    assert text.count("@triton_kernel_call_ffi") == 2  # attend and merge
    assert "stablehlo.while" in text


@pytest.mark.interpreter
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_triton_kernels_run_on_a_cpu_through_the_interpreter(wrap):
    cache, (k, v) = make_cache(), make_rows(5)
    slots = jnp.array([8, 9, 10, 11, -1])
    new = wrap(functools.partial(append_kv, impl="triton"))(cache, k, v, slots)
    np.testing.assert_array_equal(np.asarray(new.pages), reference_pages(cache, k, v, slots))
    assert (np.asarray(cache.pages) == 0xFF).all()
    table, lens = jnp.array([[2, 99]], jnp.int32), jnp.array([4], jnp.int32)
    k_read = wrap(functools.partial(gather_kv, impl="triton"))(new, table, lens)[0]
    np.testing.assert_array_equal(np.asarray(k_read), np.asarray(gather_kv(new, table, lens, impl="xla")[0]))
    q = jnp.asarray(np.random.default_rng(1).standard_normal((1, 4, 16)), jnp.float32)
    out = wrap(functools.partial(paged_attention, impl="triton"))(q, new, table, lens)
    expected = reference.paged_attention(INT8, *map(np.asarray, (q, new.pages, table, lens)))[0]
    np.testing.assert_allclose(np.asarray(out), expected, rtol=1e-5, atol=1e-5)
