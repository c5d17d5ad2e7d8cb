"""The codecs on a GPU: hardware casts and inline PTX against the portable integer code and ml_dtypes, exhaustively."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from kvq_core import CacheLayout, KVQuantMode, reference
from kvq_core.kernels.codec import decode_bytes, decode_pairs, encode_per_tensor
from kvq_torch import KVCache, append_kv_, gather_kv
from tests.compare import assert_same_bytes

pytestmark = pytest.mark.gpu

FLOAT8 = {"fp8_e4m3": ml_dtypes.float8_e4m3fn, "fp8_e5m2": ml_dtypes.float8_e5m2}
NAN_CODES = {"fp8_e4m3": 0x7F, "fp8_e5m2": 0x7E}
INFINITY_BITS = 0x7F800000
CHUNK = 1 << 26
TILE = 1024


@triton.jit
def encode_patterns(first, codes_ptr, MODE: tl.constexpr, CAPS: tl.constexpr, TILE: tl.constexpr):
    """Codes of the float32 bit patterns from ``first``, at scale 1."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    x = (i + first).to(tl.int32).to(tl.float32, bitcast=True)
    tl.store(codes_ptr + i, encode_per_tensor(x, 1.0, MODE, CAPS))


@triton.jit
def decode_all(pairs_ptr, from_bytes_ptr, from_pairs_ptr, MODE: tl.constexpr, CAPS: tl.constexpr, TILE: tl.constexpr):
    """float16 [2, TILE] of the two bytes of each pair, read as bytes and as pairs."""
    i = tl.arange(0, TILE)
    bytes_ptr = pairs_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    lower, upper = decode_pairs(tl.load(pairs_ptr + i), MODE, CAPS)
    tl.store(from_pairs_ptr + i, lower)
    tl.store(from_pairs_ptr + TILE + i, upper)
    for byte in tl.static_range(2):
        codes = tl.load(bytes_ptr + i * 2 + byte)
        tl.store(from_bytes_ptr + byte * TILE + i, decode_bytes(codes, MODE, CAPS))


def least_bits(mode: str) -> np.ndarray:
    """For every finite code from 1 up, the bits of the least positive float32 that rounds to it, ties to even.

    The tie between codes c and c + 1 is their mean, exact in float32; it belongs to the even one. Rounding is
    monotonic, so the encoding is right everywhere if it is right on both sides of every one of these bounds, which
    is checked here against ml_dtypes.
    """
    codes = np.arange(0x7F if mode == "fp8_e4m3" else 0x7C, dtype=np.uint8)
    values = codes.view(FLOAT8[mode]).astype(np.float64)
    ties = ((values[:-1] + values[1:]) / 2).astype(np.float32)
    assert (ties.astype(np.float64) * 2 == values[:-1] + values[1:]).all()
    bounds = ties.view(np.int32) + (codes[:-1] % 2 == 0)
    assert_same_bytes(bounds.view(np.float32).astype(FLOAT8[mode]).view(np.uint8), codes[1:])
    assert_same_bytes((bounds - 1).view(np.float32).astype(FLOAT8[mode]).view(np.uint8), codes[:-1])
    return bounds


def expected_codes(bits: torch.Tensor, bounds: torch.Tensor, mode: str) -> torch.Tensor:
    """The codes of float32 ``bits`` (int32): counted bounds, the sign, and the NaN code of what is not finite."""
    magnitude = bits & 0x7FFFFFFF
    codes = torch.searchsorted(bounds, magnitude, right=True, out_int32=True) | ((bits >> 24) & 0x80)
    return torch.where(magnitude < INFINITY_BITS, codes, NAN_CODES[mode]).to(torch.uint8)


@pytest.mark.parametrize("mode", FLOAT8)
def test_every_float32_gets_the_same_float8_in_hardware_in_integer_code_and_in_ml_dtypes(mode):
    bounds = torch.from_numpy(least_bits(mode)).cuda()
    codes = {caps: torch.empty(CHUNK, dtype=torch.uint8, device="cuda") for caps in ("portable", "ptx_fp8")}
    for first in range(-(2**31), 2**31, CHUNK):
        bits = torch.arange(first, first + CHUNK, device="cuda").to(torch.int32)
        expected = expected_codes(bits, bounds, mode)
        for caps, got in codes.items():
            encode_patterns[(CHUNK // TILE,)](first, got, mode, caps, TILE, enable_fp_fusion=False)
            assert torch.equal(got, expected), f"{caps}: {(got != expected).sum()} codes differ from {first:#x} on"


@pytest.mark.parametrize("caps", ["portable", "ptx", "ptx_fp8"])
@pytest.mark.parametrize("mode", [*FLOAT8, "int8_per_token_head"])
def test_every_code_is_read_alike_as_a_byte_and_as_one_of_a_pair(mode, caps):
    rng = np.random.default_rng(0)
    codes = np.stack([rng.permutation(np.arange(TILE) % 256) for _ in range(2)], axis=1).astype(np.uint8)  # [TILE, 2]
    with np.errstate(invalid="ignore"):
        expected = codes.view(KVQuantMode(mode).code_dtype).astype(np.float16).T.copy()
    pairs = torch.from_numpy(codes.view(np.int16).reshape(TILE)).cuda()
    results = torch.full((2, 2, TILE), 7.0, dtype=torch.float16, device="cuda")
    decode_all[(1,)](pairs, results[0], results[1], mode, caps, TILE)
    for got in results.cpu().numpy():
        np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
        finite = ~np.isnan(expected)
        assert_same_bytes(got[finite], expected[finite])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("mode", KVQuantMode)
def test_every_16_bit_pattern_is_written_as_the_reference_writes_it(mode, dtype):
    """In order, so that most rows hold values of one size; shuffled without NaN, so that rows hold all sizes."""
    layout = CacheLayout(mode.value, page_size=16, num_kv_heads=8, head_dim=64)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    finite = patterns[(patterns & 0x7FFF) < (0x7F80 if dtype == "bfloat16" else 0x7C00)]
    shuffled = np.resize(np.random.default_rng(0).permutation(finite), 1 << 16)
    k = np.concatenate([patterns, shuffled]).view(dtype).reshape(-1, 8, 64)
    v = np.ascontiguousarray(k[::-1])
    slots = np.arange(len(k))
    expected = np.full(layout.shape(len(k) // 16), 0xFF, np.uint8)
    reference.append_kv(layout, expected, k, v, slots)
    cache = KVCache(layout, pages=torch.full(expected.shape, 0xFF, dtype=torch.uint8, device="cuda"))
    on_gpu = [torch.from_numpy(x.view(np.int16)).view(getattr(torch, dtype)).cuda() for x in (k, v)]
    append_kv_(cache, *on_gpu, torch.from_numpy(slots).cuda())
    assert_same_bytes(cache.pages.cpu().numpy(), expected, layout)

    page_table = np.arange(len(expected), dtype=np.int32)[None]
    seq_lens = np.array([len(k)], np.int32)
    read = gather_kv(cache, torch.from_numpy(page_table).cuda(), torch.from_numpy(seq_lens).cuda())
    for got, want in zip(read, reference.gather_kv(layout, expected, page_table, seq_lens), strict=True):
        np.testing.assert_array_equal(got.cpu().numpy(), want)
