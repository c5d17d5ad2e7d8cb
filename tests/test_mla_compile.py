"""The MLA kernels compile for every GPU from their launch plans, to code with the properties that speed needs."""

from __future__ import annotations

import functools

import pytest
import torch

from kvq_core.mla import MLA_MODES
from tests import compiling
from tests.compiling import TARGETS, compiled, mla_layout, record, resources, shared_bytes
from tests.test_compile import instructions

SM_90 = TARGETS["sm_90"]
MANY_HEADS = 128
CODED = [mode for mode in MLA_MODES if mode != "bfloat16"]


def calls_of(target, mode, kv_lora_rank=512, **options):
    """The kernels of a decode and of a prefill, by name."""
    cache = mla_layout(mode, kv_lora_rank)
    launches = [compiling.mla_attention(cache, queries=queries, **options) for queries in (None, 100)]
    return {call.kernel: call for launch in launches for call in record(target, launch)}


@pytest.mark.parametrize("mode", ["bfloat16", "fp8_per_token_head"])
@pytest.mark.parametrize("name", TARGETS)
def test_every_kernel_compiles_for_every_gpu(name, mode):
    target = TARGETS[name]
    calls = calls_of(target, mode, 64, num_heads=70)
    assert sorted(calls) == ["attend_mla_queries", "attend_mla_segments", "merge_segments"]
    for call in calls.values():
        kernel = compiled(call, target.gpu)
        assert kernel.asm["hsaco" if target.gpu.backend == "hip" else "cubin"]
        assert kernel.metadata.shared <= target.shared_bytes


@pytest.mark.parametrize("mode", MLA_MODES)
@pytest.mark.parametrize("name", ["sm_89", "sm_90"])
def test_attention_fits_into_shared_memory(name, mode):
    target = TARGETS[name]
    for num_heads, dtype in ((16, torch.bfloat16), (20, torch.float16), (MANY_HEADS, torch.bfloat16)):
        for call in calls_of(target, mode, num_heads=num_heads, dtype=dtype).values():
            assert shared_bytes(call, target.gpu) <= target.shared_bytes, (call.kernel, num_heads, dtype)


@functools.cache
def hopper(mode, num_heads):
    return compiled(calls_of(SM_90, mode, num_heads=num_heads)["attend_mla_segments"], SM_90.gpu)


@pytest.mark.parametrize("mode", MLA_MODES)
def test_few_heads_keep_their_state_in_registers_and_read_no_code_byte_by_byte(mode, tmp_path):
    kernel = hopper(mode, 16)
    used = resources(kernel, tmp_path, "sm_90a")
    assert max(used.spill_stores, used.spill_loads) <= 512, used
    narrow = [opcode for opcode in instructions(kernel.asm["ptx"]) if opcode.startswith("ld.shared") and "8" in opcode]
    assert not narrow


@pytest.mark.parametrize("mode", MLA_MODES)
def test_many_heads_take_the_latent_from_one_tile_and_share_the_scores(mode):
    """See `kvq_core.kernels.mla`: two dots of 576 columns, of which each group of warps computes half the keys."""
    opcodes = instructions(hopper(mode, MANY_HEADS).asm["ptx"])
    scores = [opcode for opcode in opcodes if opcode.startswith("wgmma.mma_async") and "m64n32k16" in opcode]
    values = [opcode for opcode in opcodes if "m64n256k16" in opcode]
    loops = 2  # where all rows see all keys, and where not
    assert len(scores) == loops * (512 // 16 + 64 // 16)
    assert len(values) == loops * 64 // 16


def decode_kernel(mode, num_heads, target=SM_90, max_pages=512, queries=None, dtype=torch.bfloat16, **layout):
    """The kernel of a decode from pages that hold whole tiles."""
    cache = mla_layout(mode, **{"page_size": 64} | layout)
    launch = compiling.mla_attention(cache, 4, max_pages, queries=queries, num_heads=num_heads, dtype=dtype)
    calls = record(target, launch)
    assert calls[1].kernel == "merge_segments"
    return calls[0].kernel.removeprefix("attend_mla_")


def test_task_groups_decode_from_whole_tiles_on_hopper():
    assert decode_kernel("bfloat16", 33) == decode_kernel("bfloat16", 128, page_size=128) == "rows"
    assert decode_kernel("bfloat16", 32) == decode_kernel("bfloat16", 16) == "segments"
    for num_heads in (1, 16, 17, 32, 33, 64, 128, 200):
        assert {decode_kernel(mode, num_heads) for mode in CODED} == {"columns"}
    assert decode_kernel("fp8_e4m3", 16, page_size=192) == "columns"
    assert decode_kernel("fp8_e4m3", 128, dtype=torch.float16) == "columns"


def test_other_decodes_take_the_kernel_that_all_gpus_have():
    assert decode_kernel("fp8_per_token_head", 128, dtype=torch.float16) == "segments"
    assert decode_kernel("bfloat16", 128, dtype=torch.float16) == "segments"
    for num_heads in (16, 128):
        assert decode_kernel("fp8_e4m3", num_heads, dtype=torch.float32) == "segments"
        assert decode_kernel("fp8_e4m3", num_heads, page_size=32) == "segments"
        assert decode_kernel("fp8_e4m3", num_heads, page_size=96) == "segments"
        assert decode_kernel("fp8_e4m3", num_heads, kv_lora_rank=256) == "segments"
        assert decode_kernel("fp8_e4m3", num_heads, queries=2) == "segments"
        assert decode_kernel("fp8_e4m3", num_heads, target=TARGETS["sm_100"]) == "segments"


@pytest.mark.parametrize(("max_pages", "kernel"), [(2**24 - 1, "columns"), (2**24, "segments")])
def test_a_table_has_room_for_no_more_tiles_than_task_groups_count(max_pages, kernel):
    assert decode_kernel("fp8_e4m3", 16, max_pages=max_pages) == kernel


def task_groups(mode, num_heads):
    cache = mla_layout(mode, page_size=64)
    return compiled(record(SM_90, compiling.mla_attention(cache, num_heads=num_heads))[0], SM_90.gpu)


def test_rows_keep_tensor_cores_going(tmp_path):
    """Accumulators in registers, dots that overlap, and each consumer's scores and values of one tile and the other."""
    kernel = task_groups("bfloat16", MANY_HEADS)
    assert kernel.metadata.shared <= SM_90.shared_bytes
    assert kernel.metadata.num_warps == 12
    used = resources(kernel, tmp_path, "sm_90a")
    assert max(used.spill_stores, used.spill_loads) <= 160, used
    opcodes = instructions(kernel.asm["ptx"])
    consumers = 2
    assert sum("m64n64k16" in opcode for opcode in opcodes) == consumers * (512 + 64) // 16
    assert sum("m64n256k16" in opcode for opcode in opcodes) == consumers * 2 * 64 // 16


@pytest.mark.parametrize("num_heads", [16, 32, MANY_HEADS])
@pytest.mark.parametrize("mode", CODED)
def test_columns_decode_in_registers_what_dots_take_from_there(mode, num_heads, tmp_path):
    """Codes of keys in 16 bytes a thread, those of values through transposing loads; no operand goes back to memory.

    Of many heads some registers are spilled, but few in the loop, by Triton 3.6 next to none (logs 13 and 14).
    """
    kernel = task_groups(mode, num_heads)
    assert kernel.metadata.shared <= SM_90.shared_bytes
    assert kernel.metadata.num_warps == 12
    used = resources(kernel, tmp_path, "sm_90a")
    assert max(used.spill_stores, used.spill_loads) <= (1280 if num_heads == MANY_HEADS else 64), used
    opcodes = instructions(kernel.asm["ptx"])
    tiles, last = 2, num_heads > 16  # one of each consumer; half of the other's last values are added behind the loop
    dots = tiles * (512 + 64 + 512) // 16 + last * 256 // 16
    assert sum(f"m64n{min(64, num_heads)}k16" in opcode for opcode in opcodes) == dots
    transposing = sum(opcode.startswith("ldmatrix") and ".trans" in opcode for opcode in opcodes)
    assert transposing == tiles * 512 * 64 // 2048 + last * 256 * 64 // 2048
    narrow = [opcode for opcode in opcodes if opcode.startswith("ld.shared") and "b8" in opcode.split(".")]
    assert len(narrow) <= 1  # the task of a warp
