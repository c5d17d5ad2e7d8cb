"""Kernels compiled without a GPU: what the PyTorch launcher hands to Triton, recorded and compiled for any target.

Nothing here is a plan of its own: `record` runs `kvq_torch._triton` as it is, on CPU tensors, with a stand-in for the
kernels that keeps the arguments of every launch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
import triton.backends.nvidia
from triton._C.libtriton import ir, nvidia, passes
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.experimental.gluon._runtime import GluonASTSource

from kvq_core import CacheLayout, MLALayout, kernels
from kvq_core.arguments import AttentionCall
from kvq_core.plan import DeviceFacts, LibraryPlan, plan_library_attention
from kvq_torch import _triton
from kvq_torch._interop import array_keys, array_spec

KIB = 1024


class Target(NamedTuple):
    """A GPU that kernels are compiled for, and the most shared memory (bytes) one of its programs may use."""

    gpu: GPUTarget
    device: DeviceFacts
    shared_bytes: int


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), DeviceFacts("cuda", 80, 108), 163 * KIB),
    "sm_89": Target(GPUTarget("cuda", 89, 32), DeviceFacts("cuda", 89, 142), 99 * KIB),
    "sm_90": Target(GPUTarget("cuda", 90, 32), DeviceFacts("cuda", 90, 132), 227 * KIB),
    "sm_100": Target(GPUTarget("cuda", 100, 32), DeviceFacts("cuda", 100, 148), 227 * KIB),
    "sm_120": Target(GPUTarget("cuda", 120, 32), DeviceFacts("cuda", 120, 170), 99 * KIB),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DeviceFacts("hip", 94, 304), 64 * KIB),
}

_TRITON_TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


class KernelCall(NamedTuple):
    """What a launch makes Triton compile; equal calls share one program."""

    kernel: str
    types: tuple[str, ...]  # Triton's names of the types of the positional arguments
    constexprs: tuple[tuple[str, Hashable], ...]
    options: tuple[tuple[str, int], ...]


def record(target: Target, launch: Callable[[], Any]) -> list[KernelCall]:
    """Return what ``launch``, which calls `kvq_torch._triton`, would run on a GPU like ``target``."""
    recorder = _Recorder()
    with mock.patch.multiple(_triton, kernels=recorder, device_facts=lambda _: target.device), without_launchers():
        launch()
    return recorder.calls


@contextlib.contextmanager
def without_launchers() -> Iterator[None]:
    """A launcher is known by its device, so those of one target must not meet another, or the device at hand."""
    names = "append_launchers", "gather_launcher", "copy_launcher", "attention_launchers", "mla_launchers"
    caches = [getattr(_triton, f"_{name}") for name in names]
    for cache in caches:
        cache.cache_clear()
    try:
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


class _Recorder:
    """Stands in for `kvq_core.kernels`: ``recorder.<kernel>[grid](...)`` keeps the call."""

    def __init__(self) -> None:
        self.calls: list[KernelCall] = []

    def __getattr__(self, kernel: str) -> dict:
        return _AnyGrid(functools.partial(self._keep, getattr(kernels, kernel)))

    def _keep(self, kernel: triton.JITFunction, *args: Any, **kwargs: Any) -> None:
        types = tuple(map(_triton_type, args))
        constexprs = tuple((name, value) for name, value in kwargs.items() if name in kernel.arg_names)
        options = tuple((name, value) for name, value in kwargs.items() if name not in kernel.arg_names)
        self.calls.append(KernelCall(kernel.__name__, types, constexprs, options))


class _AnyGrid(dict):
    def __init__(self, function: Callable) -> None:
        super().__init__()
        self._function = function

    def __missing__(self, grid: Hashable) -> Callable:
        return self._function


def _triton_type(arg: Any) -> str:
    if isinstance(arg, torch.Tensor):
        return _TRITON_TYPES[arg.dtype]
    return "i32" if -(2**31) <= arg < 2**31 else "i64"


@functools.cache
def compiled(call: KernelCall, gpu: GPUTarget) -> CompiledKernel:
    """Compile ``call`` with all pointers aligned to 16 bytes and no scalar specialised, as the launchers do."""
    return triton.compile(_source(call), target=gpu, options=dict(call.options))


def shared_bytes(call: KernelCall, gpu: GPUTarget) -> int:
    """Shared memory that ``call`` takes on an NVIDIA GPU, known without the slow half of a compilation."""
    backend = make_backend(gpu)
    options = backend.parse_options(dict(call.options))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = _source(call)
    functions = backend.get_codegen_implementation(options), backend.get_module_map()
    module = source.make_ir(gpu, options, *functions, context)
    stages: dict[str, Callable] = {}
    backend.add_stages(stages, options, source.language)
    for stage in ("ttir", "ttgir"):
        module = stages[stage](module, {})
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, gpu.arch, 80)
    manager.run(module, "allocate_shared_memory")
    return module.get_int_attr("ttg.shared")


def _source(call: KernelCall) -> ASTSource:
    function = getattr(kernels, call.kernel)
    types = dict(zip(function.arg_names, call.types, strict=False))
    pointers = [i for i, name in enumerate(call.types) if name.startswith("*")]
    source = GluonASTSource if function.is_gluon() else ASTSource
    return source(
        function,
        signature=types | {name: "constexpr" for name, _ in call.constexprs},
        constexprs=dict(call.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
    )


class Resources(NamedTuple):
    """What ptxas reports of a kernel; bytes but for ``registers``."""

    registers: int
    spill_stores: int
    spill_loads: int


def resources(kernel: CompiledKernel, directory: Path, arch: str) -> Resources:
    """Assemble the PTX of ``kernel`` for ``arch`` ("sm_90a"), as Triton does, and return what it takes."""
    (directory / "kernel.ptx").write_text(kernel.asm["ptx"])
    ptxas = Path(triton.backends.nvidia.__file__).parent / "bin" / "ptxas"
    command = [str(ptxas), "-v", f"--gpu-name={arch}", str(directory / "kernel.ptx"), "-o", str(directory / "cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "wgmma.mma_async instructions are serialized" not in report, report
    counts = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers", report, re.DOTALL)
    assert counts, report
    stores, loads, registers = map(int, counts.groups())
    return Resources(registers, stores, loads)


def layout(mode: str, head_dim: int = 128, **kwargs: Any) -> CacheLayout:
    """A layout of eight KV heads and pages of 16."""
    return CacheLayout(mode, **{"page_size": 16, "num_kv_heads": 8, "head_dim": head_dim} | kwargs)


def _pages(cache: CacheLayout | MLALayout, num_pages: int, strides: tuple[int, ...] | None = None) -> torch.Tensor:
    dense = torch.empty(cache.shape(num_pages), dtype=torch.uint8)
    return dense if strides is None else torch.empty_strided(dense.shape, strides, dtype=torch.uint8)


def _indices(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32)


SCALE = torch.ones(())


def append(
    cache: CacheLayout,
    num_tokens: int = 300,
    dtype: torch.dtype = torch.bfloat16,
    num_pages: int = 64,
    strides: tuple[int, ...] | None = None,
) -> Callable[[], Any]:
    """A launch of append_kv, and of claim_slots from 257 tokens on; ``strides`` of the pages, here and below."""
    k = torch.empty((num_tokens, cache.num_kv_heads, cache.head_dim), dtype=dtype)
    v = torch.empty((num_tokens, cache.num_kv_heads, cache.head_dim_v), dtype=dtype)
    pages = _pages(cache, num_pages, strides)
    return lambda: _triton.append_kv_(cache, pages, SCALE, SCALE, k, v, _indices(num_tokens))


def gather(
    cache: CacheLayout,
    num_seqs: int = 3,
    max_pages: int = 7,
    dtype: torch.dtype = torch.float32,
    num_pages: int = 64,
    strides: tuple[int, ...] | None = None,
) -> Callable[[], Any]:
    """A launch of gather_kv."""
    pages = _pages(cache, num_pages, strides)
    return lambda: _triton.gather_kv(
        cache, pages, SCALE, SCALE, _indices(num_seqs, max_pages), _indices(num_seqs), dtype
    )


def copy(
    cache: CacheLayout, num_pairs: int = 3, num_pages: int = 64, strides: tuple[int, ...] | None = None
) -> Callable[[], Any]:
    """A launch of copy_pages."""
    pages = _pages(cache, num_pages, strides)
    return lambda: _triton.copy_pages_(pages, _indices(num_pairs), _indices(num_pairs))


_NUMBERS = {"sm_scale": None, "causal": True, "window": None, "softcap": None}


def attention(
    cache: CacheLayout,
    num_seqs: int = 4,
    max_pages: int = 512,
    *,
    queries: int | None = None,
    num_q_heads: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    num_pages: int = 64,
    strides: tuple[int, ...] | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    **options: Any,
) -> Callable[[], Any]:
    """A launch of paged_attention: decode (``queries`` None), or ``queries`` a sequence through ``cu_seqlens_q``."""
    num_tokens = num_seqs * (queries or 1)
    q = torch.empty((num_tokens, num_q_heads, cache.head_dim), dtype=dtype)
    pages = _pages(cache, num_pages, strides)
    table, lengths = _indices(num_seqs, max_pages), _indices(num_seqs)
    optional = None if queries is None else _indices(num_seqs + 1), sinks, alibi_slopes
    keys = array_keys(q, pages, table, lengths, *optional)
    numbers = queries, *(_NUMBERS | options).values()  # one too many for a call, if a name is misspelt
    return lambda: _triton.paged_attention(cache, (keys, numbers), q, pages, SCALE, SCALE, table, lengths, *optional)


def mla_layout(mode: str, kv_lora_rank: int = 512, **kwargs: Any) -> MLALayout:
    """A layout of pages of 16."""
    return MLALayout(mode, **{"page_size": 16, "kv_lora_rank": kv_lora_rank} | kwargs)


def mla_attention(
    cache: MLALayout,
    num_seqs: int = 4,
    max_pages: int = 512,
    *,
    queries: int | None = None,
    num_heads: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    num_pages: int = 64,
    causal: bool = True,
) -> Callable[[], Any]:
    """A launch of mla_attention: decode (``queries`` None), or ``queries`` a sequence through ``cu_seqlens_q``."""
    q = torch.empty((num_seqs * (queries or 1), num_heads, cache.head_dim), dtype=dtype)
    pages = _pages(cache, num_pages)
    table, lengths = _indices(num_seqs, max_pages), _indices(num_seqs)
    starts = None if queries is None else _indices(num_seqs + 1)
    call = array_keys(q, pages, table, lengths, starts, None, None), (queries, 0.1, causal)
    return lambda: _triton.mla_attention(cache, call, q, pages, SCALE, table, lengths, starts)


def library_prefill(
    cache: CacheLayout, num_seqs: int = 2, max_pages: int = 64, *, queries: int = 100, prefix: int = 0
) -> Callable[[], Any]:
    """The launches around a library's attention: gather_kv into bfloat16, and finish_queries."""
    q = torch.empty((num_seqs * queries, 4 * cache.num_kv_heads, cache.head_dim), dtype=torch.bfloat16)
    pages, table, lengths = _pages(cache, 64), _indices(num_seqs, max_pages), _indices(num_seqs)
    starts, lse = _indices(num_seqs + 1), torch.empty(num_seqs, q.shape[1], queries)
    call = AttentionCall(*map(array_spec, (q, pages, table, lengths, starts)), max_seqlen_q=queries)

    def run() -> None:
        plan = plan_library_attention(cache, call, queries + prefix, _triton.device_facts(q.device))
        assert isinstance(plan, LibraryPlan), plan
        _triton.launch(plan.gather, pages, SCALE, SCALE, table, lengths)
        _triton.launch(plan.finish, q, pages, SCALE, SCALE, SCALE, SCALE, table, lengths, starts, q, lse, q, lse)

    return run
