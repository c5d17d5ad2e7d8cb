"""Every kernel compiles for every GPU from its launch plan, to code with the properties that speed and bytes need."""

from __future__ import annotations

import functools
import re

import pytest
import torch

from kvq_core import KVQuantMode
from tests import compiling
from tests.compiling import TARGETS, KernelCall, Target, compiled, layout, record, resources, shared_bytes

MODES = [mode.value for mode in KVQuantMode]
MIXED = "int8_per_token_head/fp8_e4m3"
KERNELS = [
    "append_kv",
    "claim_slots",
    "gather_kv",
    "copy_pages",
    "attend_segments",
    "merge_segments",
    "attend_queries",
    "finish_queries",
]
MIXED_SCALES = "int8_per_token_head/fp8_per_token_head"
ROWS = {"scale_placement": "row", "row_order": "NHD"}
SM_90 = TARGETS["sm_90"]


def q_dtype(mode: str) -> torch.dtype:
    """The queries that a cache in ``mode`` is made for."""
    return getattr(torch, mode) if mode in ("float16", "float32") else torch.bfloat16


def calls_of(target: Target, mode: str, head_dim: int, **placement: str) -> dict[str, KernelCall]:
    """One launch of every kernel, by its name."""
    cache = layout(mode, head_dim, **placement)
    launches = [
        compiling.append(cache),
        compiling.library_prefill(cache, prefix=28),
        compiling.gather(cache),
        compiling.copy(cache),
        compiling.attention(cache, dtype=q_dtype(mode)),
        compiling.attention(cache, dtype=q_dtype(mode), queries=100),
    ]
    return {call.kernel: call for launch in launches for call in record(target, launch)}


def ptx_of(kernel: str, mode: str, head_dim: int = 128, **placement: str) -> str:
    return compiled(calls_of(SM_90, mode, head_dim, **placement)[kernel], SM_90.gpu).asm["ptx"]


def instructions(ptx: str) -> list[str]:
    """The opcodes of ``ptx``, such as ``ld.global.v4.b32``."""
    return re.findall(r"^\s*(?:@!?%\S+\s+)?([a-z][\w.:]+)\s", ptx, re.MULTILINE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mode", [*MODES, MIXED])
def test_every_kernel_compiles_for_hopper_in_every_mode(mode, kernel):
    kernel = compiled(calls_of(SM_90, mode, head_dim=64)[kernel], SM_90.gpu)
    assert kernel.metadata.shared <= SM_90.shared_bytes
    assert kernel.asm["cubin"]


@pytest.mark.parametrize("mode", ["bfloat16", MIXED_SCALES])
@pytest.mark.parametrize("name", [name for name in TARGETS if name != "sm_90"])
def test_every_kernel_compiles_for_every_gpu(name, mode):
    target = TARGETS[name]
    calls = calls_of(target, mode, head_dim=64)
    assert sorted(calls) == sorted(KERNELS)
    for call in calls.values():
        kernel = compiled(call, target.gpu)
        assert kernel.asm["hsaco" if target.gpu.backend == "hip" else "cubin"]
        assert kernel.metadata.shared <= target.shared_bytes


@pytest.mark.parametrize("name", ["sm_80", "sm_90", "gfx942"])
def test_every_kernel_compiles_over_row_containers(name):
    target = TARGETS[name]
    calls = calls_of(target, MIXED_SCALES, 80, **ROWS)
    assert sorted(calls) == sorted(KERNELS)
    for call in calls.values():
        kernel = compiled(call, target.gpu)
        assert kernel.asm["hsaco" if target.gpu.backend == "hip" else "cubin"]
        assert kernel.metadata.shared <= target.shared_bytes


def test_rows_of_a_container_move_in_as_many_bytes_as_they_are_aligned_to():
    """A row is 264 bytes: K lies at a multiple of 8, V of 4. Wider accesses would fault, narrower ones crawl."""
    ptx = {kernel: ptx_of(kernel, "int8_per_token_head", **ROWS) for kernel in KERNELS}
    for kernel in ("attend_segments", "attend_queries"):
        assert set(re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (\S+),", ptx[kernel])) == {"0x4", "0x8"}
    for kernel, access in (("append_kv", "st.global"), ("gather_kv", "ld.global")):
        opcodes = {opcode for opcode in instructions(ptx[kernel]) if opcode.startswith(access)}
        assert opcodes == {f"{access}.v2.b32", f"{access}.b32"}


@pytest.mark.parametrize(("mode", "head_dim"), [("int8_per_token_head", 128), ("fp8_per_token_head", 256)])
def test_32_rows_of_8_bits_take_hoppers_own_dots(mode, head_dim):
    call, *_ = record(SM_90, compiling.attention(layout(mode, head_dim, num_kv_heads=1), num_q_heads=32))
    kernel = compiled(call, SM_90.gpu)
    opcodes = instructions(kernel.asm["ptx"])
    assert not [opcode for opcode in opcodes if opcode.startswith("mma.")]
    assert any(opcode.startswith("wgmma.mma_async") for opcode in opcodes)
    # Codes are read in words: no operand is put together from bytes or pairs of them.
    assert not [opcode for opcode in opcodes if re.fullmatch(r"ld\.shared(\.v\d)?\.[bus](8|16)", opcode)]
    assert 2 * kernel.metadata.shared <= SM_90.shared_bytes  # two programs, eight warps, on a multiprocessor


@pytest.mark.parametrize(("head_dim", "head_dim_v"), [(16, 128), (32, 128), (256, 64)])
def test_32_rows_compile_for_any_head_dims(head_dim, head_dim_v):
    cache = layout("int8_per_token_head", head_dim, head_dim_v=head_dim_v, num_kv_heads=1)
    call, *_ = record(SM_90, compiling.attention(cache, num_q_heads=32))
    assert compiled(call, SM_90.gpu).metadata.shared <= SM_90.shared_bytes


@pytest.mark.parametrize("mode", MODES)
def test_append_divides_and_rounds_as_ieee_754(mode):
    """A contracted multiply-add would round once where the format rounds twice; an approximate quotient, wrongly."""
    opcodes = instructions(ptx_of("append_kv", mode))
    assert not [
        opcode for opcode in opcodes if opcode.startswith(("fma.", "mad.rn.f", "div.full", "div.approx", "rcp."))
    ]
    assert not [opcode for opcode in opcodes if ".ftz" in opcode]
    assert ("div.rn.f32" in opcodes) == KVQuantMode(mode).is_quantized


@pytest.mark.parametrize(("name", "has_cast"), [("sm_80", False), ("sm_89", True), ("sm_90", True)])
def test_float8_is_cast_in_hardware_where_there_is_such_a_cast(name, has_cast):
    target = TARGETS[name]
    for kernel in ("append_kv", "gather_kv"):
        opcodes = instructions(compiled(calls_of(target, "fp8_per_token_head", 128)[kernel], target.gpu).asm["ptx"])
        assert any("e4m3x2" in opcode for opcode in opcodes) == has_cast, kernel


@pytest.mark.parametrize("mode", ["bfloat16", "fp8_per_token_head", "int8_per_token_head"])
@pytest.mark.parametrize("kernel", ["attend_segments", "attend_queries"])
def test_attention_reads_codes_in_16_bytes_and_no_operand_byte_by_byte(kernel, mode):
    ptx = ptx_of(kernel, mode)
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
    narrow = re.compile(r"ld\.global[\w:.]*\.[bsu](8|16)|ld\.shared[\w:.]*\.[bsu]8")
    assert not [opcode for opcode in instructions(ptx) if narrow.fullmatch(opcode)]


@pytest.mark.parametrize("kernel", ["append_kv", "gather_kv", "copy_pages"])
@pytest.mark.parametrize("mode", ["bfloat16", "fp8_per_token_head", "int8_per_token_head"])
def test_rows_move_in_16_bytes(kernel, mode):
    assert {"ld.global.v4.b32", "st.global.v4.b32"} <= set(instructions(ptx_of(kernel, mode)))


@pytest.mark.parametrize("mode", ["bfloat16", "fp8_per_token_head", "int8_per_token_head"])
def test_decode_keeps_its_state_in_registers(mode, tmp_path):
    """A few words may go, such as addresses used once a sequence; the accumulators are 256 bytes a thread."""
    used = resources(compiled(calls_of(SM_90, mode, 128)["attend_segments"], SM_90.gpu), tmp_path, "sm_90a")
    assert max(used.spill_stores, used.spill_loads) <= 64, used


@pytest.mark.parametrize("head_dim", [256, 512])
@pytest.mark.parametrize("mode", ["bfloat16", "float32", "int8_per_token_head"])
@pytest.mark.parametrize("name", ["sm_89", "sm_90"])
def test_attention_fits_into_shared_memory(name, mode, head_dim):
    """sm_120 has what sm_89 has, sm_100 what sm_90 has; codes of one width take the same room."""
    target = TARGETS[name]
    attention = functools.partial(compiling.attention, layout(mode, head_dim))
    for dtype in {q_dtype(mode), torch.float32}:
        for queries in (None, 16, 100):  # of four heads a group: a decode of 16 rows, one of 64, and a prefill
            call, *_ = record(target, attention(dtype=dtype, queries=queries))
            assert shared_bytes(call, target.gpu) <= target.shared_bytes, (dtype, queries)
