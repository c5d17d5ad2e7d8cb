"""The names of storage modes and what each means."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvq_core import (
    KVQuantMode,
    get_kv_quant_mode,
    kv_cache_uses_per_token_head_scales,
    parse_kv_cache_dtype,
)

# name: code dtype, qmax, per token and head, per tensor
MODES = {
    "bfloat16": (ml_dtypes.bfloat16, None, False, False),
    "float16": (np.float16, None, False, False),
    "float32": (np.float32, None, False, False),
    "fp8_e4m3": (ml_dtypes.float8_e4m3fn, 448, False, True),
    "fp8_e5m2": (ml_dtypes.float8_e5m2, 57344, False, True),
    "int8_per_token_head": (np.int8, 127, True, False),
    "fp8_per_token_head": (ml_dtypes.float8_e4m3fn, 448, True, False),
}


def test_modes_are_those_of_the_format():
    assert [mode.value for mode in KVQuantMode] == list(MODES)


@pytest.mark.parametrize("name", MODES)
def test_mode_has_the_code_dtype_and_scales_of_the_format(name):
    mode = get_kv_quant_mode(name)
    code_dtype, qmax, is_per_token_head, is_per_tensor = MODES[name]
    assert mode.value == name
    assert mode.code_dtype == np.dtype(code_dtype)
    assert mode.bits == 8 * np.dtype(code_dtype).itemsize
    assert (mode.qmax, mode.is_quantized) == (qmax, qmax is not None)
    assert (mode.is_per_token_head, mode.is_per_tensor) == (is_per_token_head, is_per_tensor)
    assert kv_cache_uses_per_token_head_scales(name) == is_per_token_head


def test_fp8_is_fp8_e4m3():
    assert get_kv_quant_mode("fp8") is KVQuantMode.FP8_E4M3
    assert parse_kv_cache_dtype("fp8/fp8_e5m2") == (KVQuantMode.FP8_E4M3, KVQuantMode.FP8_E5M2)


def test_a_mode_names_itself():
    assert get_kv_quant_mode(KVQuantMode.FLOAT16) is KVQuantMode.FLOAT16


def test_one_name_means_both_sides():
    assert parse_kv_cache_dtype("bfloat16") == parse_kv_cache_dtype("bfloat16/bfloat16")


@pytest.mark.parametrize("pair", ["int8_per_token_head/bfloat16", "bfloat16/fp8_per_token_head"])
def test_one_side_with_row_scales_is_enough_to_use_them(pair):
    assert kv_cache_uses_per_token_head_scales(pair)


@pytest.mark.parametrize("name", ["int8", "", "auto", "FP8", "fp8_e4m3 ", "float64"])
def test_unknown_mode_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="int8_per_token_head") as error:
        get_kv_quant_mode(name)
    assert repr(name) in str(error.value)


def test_pair_where_one_mode_is_asked_for_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="parse_kv_cache_dtype"):
        get_kv_quant_mode("fp8/fp8")


@pytest.mark.parametrize("pair", ["fp8/", "/fp8", "fp8/int4", "fp8/fp8/fp8"])
def test_malformed_pair_is_refused(pair):
    with pytest.raises(ValueError, match="expected"):
        parse_kv_cache_dtype(pair)
