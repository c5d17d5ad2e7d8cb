"""The ops through the Triton kernels of `kvq_core.kernels`: executes launch plans, decides nothing.

On a GPU jax-triton (Triton itself, where the kernel is in Gluon) compiles a plan's kernel and jaxlib launches it. On a
CPU, with ``TRITON_INTERPRET=1``, the same kernel runs through the Triton interpreter inside a callback.
"""

from __future__ import annotations

import functools
import importlib
import os
import zlib
from types import ModuleType
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from kvq_core.arguments import AttentionCall
from kvq_core.plan import (
    DeviceFacts,
    LaunchPlan,
    plan_append_kv,
    plan_copy_pages,
    plan_gather_kv,
    plan_mla_attention,
    plan_paged_attention,
)
from kvq_jax._interop import array_spec, device_facts, vary_like
from kvq_jax.cache import KVCache

# Of jaxlib, which launches what jax-triton compiles. jax-triton itself calls the older "triton_kernel_call", which XLA
# cannot record into a CUDA graph: a decode took about a microsecond longer.
_TARGET = "triton_kernel_call_ffi"
_VMAP = "sequential"  # one launch after another
_ALIGNMENT = 16  # bytes, of every array: what jax-triton compiles for


def append_kv(cache: KVCache, k: jax.Array, v: jax.Array, slot_mapping: jax.Array) -> jax.Array:
    """Return the pages with the tokens written to their slots; in place if the pages are donated."""
    device = device_facts(cache.pages)
    specs = (array_spec(x) for x in (cache.pages, k, v, slot_mapping))
    plan = plan_append_kv(cache.layout, *specs, device)
    if plan is None:
        return cache.pages
    # Without a claim the kernel does not read the winners, and any array of their dtype will do.
    winners = slot_mapping if plan.claim is None else launch(plan.claim, device, slot_mapping)[0]
    return launch(plan.append, device, k, v, slot_mapping, winners, cache.k_scale, cache.v_scale, cache.pages)[0]


def gather_kv(cache: KVCache, page_table: jax.Array, seq_lens: jax.Array, dtype: str) -> tuple[jax.Array, jax.Array]:
    """Return K and V of the sequences as dense arrays."""
    layout, device = cache.layout, device_facts(cache.pages)
    specs = (array_spec(x) for x in (cache.pages, page_table, seq_lens))
    plan = plan_gather_kv(layout, *specs, dtype, device)
    if plan is None:
        (num_seqs, max_pages), num_kv_heads = page_table.shape, cache.pages.shape[layout.head_axis]
        shape = (num_seqs, max_pages * layout.page_size, num_kv_heads)
        return jnp.zeros((*shape, layout.head_dim), dtype), jnp.zeros((*shape, layout.head_dim_v or 0), dtype)
    k, v = launch(plan, device, cache.pages, cache.k_scale, cache.v_scale, page_table, seq_lens)
    return k, v


def copy_pages(pages: jax.Array, src: jax.Array, dst: jax.Array) -> jax.Array:
    """Return the pages with page ``src[i]`` copied to page ``dst[i]``; in place if the pages are donated."""
    device = device_facts(pages)
    plan = plan_copy_pages(array_spec(pages), array_spec(src), array_spec(dst), device)
    return pages if plan is None else launch(plan, device, src, dst, pages)[0]


def paged_attention(
    call: AttentionCall,
    q: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    seq_lens: jax.Array,
    cu_seqlens_q: jax.Array | None,
    sinks: jax.Array | None,
    alibi_slopes: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return values in q's dtype ``[num_q_tokens, num_q_heads, head_dim_v]`` and log-sum-exp, float32."""
    layout, pages, device = cache.layout, _readable(cache.pages), device_facts(cache.pages)
    plan = plan_paged_attention(layout, call, device)
    if plan is None:
        out = jnp.zeros((*q.shape[:2], layout.head_dim_v or 0), q.dtype)
        return out, jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    # A kernel has a pointer for every argument; where there is none it is not read, and any array will do.
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    sinks = cache.k_scale if sinks is None else sinks
    slopes = cache.k_scale if alibi_slopes is None else alibi_slopes
    scales = (cache.k_scale, cache.v_scale)
    results = launch(plan.attend, device, q, pages, *scales, sinks, slopes, page_table, seq_lens, cu_seqlens_q)
    if plan.merge is not None:
        results = launch(plan.merge, device, *results, sinks, seq_lens, cu_seqlens_q)
    out, lse = results
    return out, lse


def mla_attention(
    call: AttentionCall,
    q: jax.Array,
    cache: KVCache,
    page_table: jax.Array,
    seq_lens: jax.Array,
    cu_seqlens_q: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Return values in q's dtype ``[num_q_tokens, num_heads, kv_lora_rank]`` and log-sum-exp, float32."""
    layout, pages, device = cache.layout, _readable(cache.pages), device_facts(cache.pages)
    plan = plan_mla_attention(layout, call, device)
    if plan is None:
        out = jnp.zeros((*q.shape[:2], layout.head_dim_v or 0), q.dtype)
        return out, jnp.full(q.shape[:2], -jnp.inf, jnp.float32)
    cu_seqlens_q = seq_lens if cu_seqlens_q is None else cu_seqlens_q
    results = launch(plan.attend, device, q, pages, cache.k_scale, page_table, seq_lens, cu_seqlens_q)
    if plan.merge is not None:
        results = launch(plan.merge, device, *results, cache.k_scale, seq_lens, cu_seqlens_q)
    out, lse = results
    return out, lse


def _readable(pages: jax.Array) -> jax.Array:
    """``pages``; of a pool that has none, one, because kernels read page 0 for an id outside the pool."""
    return pages if pages.shape[0] else jnp.zeros((1, *pages.shape[1:]), pages.dtype)


def launch(plan: LaunchPlan, device: DeviceFacts, *inputs: jax.Array) -> list[jax.Array]:
    """Run ``plan`` on ``inputs`` and return its outputs."""
    call = _call_interpreter if device.backend == "interpreter" else _call_triton
    return vary_like(call(plan, device, inputs), *inputs)


def _call_triton(plan: LaunchPlan, device: DeviceFacts, inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
    aliases = {output.alias: i for i, output in enumerate(plan.outputs) if output.alias is not None}
    call = jax.ffi.ffi_call(_TARGET, _out_shape(plan), input_output_aliases=aliases, vmap_method=_VMAP)
    opaque = _kernel_call(plan, device, tuple(x.dtype.name for x in inputs))
    # Inside a shard_map an ffi_call wants inputs that vary alike; a page table may be the same on all devices.
    return list(call(*vary_like(inputs, *inputs), name=plan.kernel, opaque=opaque))


@functools.lru_cache(maxsize=4096)
def _kernel_call(plan: LaunchPlan, device: DeviceFacts, dtypes: tuple[str, ...]) -> bytes:
    """The launch of ``plan`` on inputs of ``dtypes`` as `_TARGET` reads it: PTX, grid and scalars."""
    from kvq_core import kernels

    library = _jax_triton().triton_lib
    inputs, outputs = (
        [library.get_triton_type(jax.core.ShapedArray((), jnp.dtype(dtype))) for dtype in names]
        for names in (dtypes, (output.dtype for output in plan.outputs))
    )
    scalars = [library.get_triton_type(scalar) for scalar in plan.scalars]
    function = getattr(kernels, plan.kernel)
    compile_ = _compile_gluon if function.is_gluon() else _compile
    kernel = compile_(function, plan, device, inputs, scalars, outputs)
    lib = library.triton_kernel_call_lib
    array = lib.create_array_parameter(0, _ALIGNMENT)
    values = [lib.create_scalar_parameter(*scalar) for scalar in zip(plan.scalars, scalars, strict=True)]
    parameters = [array] * len(inputs) + values + [array] * len(outputs)
    return zlib.compress(lib.TritonKernelCall(kernel, *plan.grid, parameters).to_proto(plan.kernel, b""))


def _compile(
    function: Any, plan: LaunchPlan, device: DeviceFacts, inputs: list[str], scalars: list[str], outputs: list[str]
) -> Any:
    """The kernel of ``plan`` for operands of Triton's types, as jaxlib takes it."""
    library = _jax_triton().triton_lib
    is_cuda = device.backend == "cuda"
    # Any value but 1, which jax-triton would fold into the program: it would compile the kernel once more, and its PTX
    # would differ from PyTorch's, where these scalars are never specialised.
    unknown = [(i, dtype, 0) for i, dtype in enumerate(scalars, start=len(inputs))]
    kernel, _ = library.get_or_create_triton_kernel(
        library.get_cuda_backend if is_cuda else library.get_hip_backend,
        "cuda" if is_cuda else "rocm",
        function,
        [*inputs, *scalars, *outputs],
        unknown,
        num_warps=plan.num_warps,
        num_stages=plan.num_stages,
        num_ctas=1,
        compute_capability=device.arch if is_cuda else None,
        enable_fp_fusion=plan.enable_fp_fusion,
        metaparams=dict(plan.constexprs),
        dump=False,
    )
    return kernel


def _compile_gluon(
    function: Any, plan: LaunchPlan, device: DeviceFacts, inputs: list[str], scalars: list[str], outputs: list[str]
) -> Any:
    """`_compile` for a kernel in Gluon, which jax-triton does not know."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    types = [*inputs, *scalars, *outputs]
    constexprs = dict(plan.constexprs)
    source = GluonASTSource(
        function,
        signature=dict(zip(function.arg_names, types, strict=False)) | dict.fromkeys(constexprs, "constexpr"),
        constexprs=constexprs,
        attrs={(i,): [["tt.divisibility", _ALIGNMENT]] for i, name in enumerate(types) if name.startswith("*")},
    )
    options = {
        "num_warps": plan.num_warps,
        "num_stages": plan.num_stages,
        "enable_fp_fusion": plan.enable_fp_fusion,
    }
    compiled = triton.compile(source, target=GPUTarget(device.backend, device.arch, 32), options=options)
    facts = compiled.metadata
    lib = _jax_triton().triton_lib.triton_kernel_call_lib
    return lib.TritonKernel(
        facts.name, facts.num_warps, facts.num_ctas, facts.shared, compiled.asm["ptx"], "", device.arch
    )


def _call_interpreter(plan: LaunchPlan, device: DeviceFacts, inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
    from kvq_core.kernels import interpret

    def run(*arrays: jax.Array) -> list[np.ndarray]:
        return interpret.run(plan, [np.asarray(x) for x in arrays])

    return jax.pure_callback(run, _out_shape(plan), *inputs, vmap_method=_VMAP)


def _out_shape(plan: LaunchPlan) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(output.shape, jnp.dtype(output.dtype)) for output in plan.outputs]


def _jax_triton() -> ModuleType:
    """jax_triton, imported at the first launch.

    The import sets ``TRITON_CACHE_DIR`` to "", after which PyTorch can compile no Triton kernel any more.
    """
    before = os.environ.get("TRITON_CACHE_DIR")
    try:
        return importlib.import_module("jax_triton")
    finally:
        if before is None:
            os.environ.pop("TRITON_CACHE_DIR", None)
        else:
            os.environ["TRITON_CACHE_DIR"] = before
