"""The two asserts of the project can fail, and say where."""

from __future__ import annotations

import numpy as np
import pytest

from kvq_core import CacheLayout, reference
from tests.compare import Attention, assert_no_worse_than_naive, assert_same_bytes

LAYOUT = CacheLayout("int8_per_token_head", page_size=4, num_kv_heads=2, head_dim=16)


def _attention(error: float = 0.0, lse_error: float = 0.0) -> Attention:
    values = np.linspace(1, 2, 24).reshape(2, 3, 4)
    return Attention((values * (1 + error)).astype(np.float32), (values[..., 0] + lse_error).astype(np.float32))


EXACT = Attention(*(x.astype(np.float64) for x in _attention()))
NAIVE = _attention(error=1e-3, lse_error=1e-3)


def test_equal_bytes_pass_even_where_they_are_nan():
    assert_same_bytes(np.full(3, np.nan), np.full(3, np.nan))


@pytest.mark.parametrize(
    ("name", "place"),
    [("k_codes", "field k_codes, row 2, column 7"), ("v_scales", "field v_scales, row 2, column 0")],
)
def test_a_wrong_byte_fails_and_is_named(name, place):
    want = np.zeros(LAYOUT.shape(3), np.uint8)
    got = want.copy()
    column = 7 if name == "k_codes" else 0
    reference.record_field(LAYOUT, got, name).view(np.uint8)[1, 1, 2, column] = 5
    with pytest.raises(
        AssertionError, match=f"1 of .* bytes differ, the first at page 1, head 1, {place}: .*0x00.*0x05"
    ):
        assert_same_bytes(got, want, LAYOUT)


def test_a_wrong_byte_of_a_row_container_is_named():
    layout = CacheLayout("int8_per_token_head", page_size=4, num_kv_heads=2, head_dim=16, scale_placement="row")
    want = np.zeros(layout.shape(3), np.uint8)
    got = want.copy()
    reference.record_field(layout, got, "v_codes").view(np.uint8)[1, 0, 2, 7] = 5
    with pytest.raises(AssertionError, match=r"at row \(1, 0, 2\), field v_codes, column 7: .*0x00.*0x05"):
        assert_same_bytes(got, want, layout)


@pytest.mark.parametrize("wrong", [np.zeros(3, np.uint8), np.zeros((1, 2), np.uint8), np.zeros(2, np.int8)])
def test_another_shape_or_dtype_fails(wrong):
    with pytest.raises(AssertionError, match="expected uint8"):
        assert_same_bytes(wrong, np.zeros(2, np.uint8))


def test_zeros_of_different_sign_are_different_bytes():
    with pytest.raises(AssertionError, match="byte 3"):
        assert_same_bytes(np.float32([-0.0]), np.float32([0.0]))


def test_an_error_below_the_naive_one_passes():
    assert_no_worse_than_naive(_attention(1.2e-3, 1.2e-3), EXACT, NAIVE)
    assert_no_worse_than_naive(_attention(), EXACT, _attention())


@pytest.mark.parametrize(("errors", "name"), [((1.3e-3, 0.0), "out"), ((0.0, 1.3e-3), "lse")])
def test_an_error_above_the_naive_one_fails(errors, name):
    with pytest.raises(AssertionError, match=f"{name}: relative error"):
        assert_no_worse_than_naive(_attention(*errors), EXACT, NAIVE)


@pytest.mark.parametrize(("special", "wrong"), [(np.nan, 1.0), (np.inf, np.nan), (np.nan, np.inf), (-np.inf, np.inf)])
def test_specials_agree_both_ways(special, wrong):
    expected = EXACT.lse.copy()
    expected[1, 2] = special
    got = expected.astype(np.float32)
    assert_no_worse_than_naive(_attention()._replace(lse=got), EXACT._replace(lse=expected), NAIVE)
    got[1, 2] = wrong
    with pytest.raises(AssertionError, match=r"lse: 1 of 6 NaN or infinities differ, the first at \(1, 2\)"):
        assert_no_worse_than_naive(_attention()._replace(lse=got), EXACT._replace(lse=expected), NAIVE)


def test_a_nan_where_a_number_belongs_fails():
    out = EXACT.out.astype(np.float32)
    out[0, 1, 2] = np.nan
    with pytest.raises(AssertionError, match=r"out: 1 of 24 NaN or infinities differ, the first at \(0, 1, 2\)"):
        assert_no_worse_than_naive(_attention()._replace(out=out), EXACT, NAIVE)


def test_a_case_whose_naive_result_overflows_is_refused():
    naive = NAIVE._replace(out=np.full_like(NAIVE.out, np.inf))
    with pytest.raises(AssertionError, match="would prove nothing"):
        assert_no_worse_than_naive(_attention(), EXACT, naive)


def test_a_result_in_another_dtype_fails():
    with pytest.raises(AssertionError, match="values in float32; got float16"):
        assert_no_worse_than_naive(_attention()._replace(out=EXACT.out.astype(np.float16)), EXACT, NAIVE)
