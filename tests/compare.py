"""The two asserts of the project: equal bytes, and an error against float64 that is no worse than the naive path's."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

from kvq_core import CacheLayout


class Attention(NamedTuple):
    """Results of attention: values ``[num_q_tokens, num_q_heads, head_dim_v]``, log-sum-exp without the last axis."""

    out: np.ndarray
    lse: np.ndarray


def assert_same_bytes(got: np.ndarray, want: np.ndarray, layout: CacheLayout | None = None) -> None:
    """Equal shapes, dtypes and bytes; the message names the first byte that differs, in pages of ``layout``."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), (
        f"expected {want.dtype}{want.shape}; got {got.dtype}{got.shape}"
    )
    got_bytes, want_bytes = _bytes(got), _bytes(want)
    differing = np.flatnonzero(got_bytes != want_bytes)
    if differing.size:
        first = int(differing[0])
        raise AssertionError(
            f"{differing.size} of {want_bytes.size} bytes differ, the first at {_place(first, want, layout)}: "
            f"expected 0x{want_bytes[first]:02x}; got 0x{got_bytes[first]:02x}"
        )


def assert_no_worse_than_naive(got: Attention, exact: Attention, naive: Attention) -> None:
    """The accuracy rule of DESIGN.md section 4.

    Where ``exact`` (float64) is NaN or infinite, ``got`` is the same, and nowhere else. The relative L2 error of the
    values is at most 1.25 times that of ``naive`` plus one rounding of the dtype of ``got``; the error of the
    log-sum-exp, relative to its size or 1, likewise plus four roundings of float32.
    """
    assert got.lse.dtype == np.float32, f"expected lse in float32; got {got.lse.dtype}"
    assert got.out.dtype == naive.out.dtype, f"expected values in {naive.out.dtype}; got {got.out.dtype}"
    _assert_close("out", got.out, exact.out, naive.out, least=0.0, slack=_rounding(got.out.dtype))
    _assert_close("lse", got.lse, exact.lse, naive.lse, least=1.0, slack=4 * _rounding(got.lse.dtype))


def with_one_nan(x: np.ndarray) -> np.ndarray:
    """``x`` with every NaN the same: which NaN an operation gives is not part of any contract."""
    return np.where(np.isnan(x), np.array(np.nan, x.dtype), x)


def _assert_close(name: str, got: np.ndarray, exact: np.ndarray, naive: np.ndarray, least: float, slack: float) -> None:
    assert got.shape == exact.shape, f"expected {name} of shape {exact.shape}; got {got.shape}"
    got, naive = got.astype(np.float64), naive.astype(np.float64)
    finite = np.isfinite(exact)
    _assert_same_specials(name, got, exact, finite)
    assert np.isfinite(naive[finite]).all(), f"the naive {name} overflows, so this case would prove nothing"
    size = np.linalg.norm(np.maximum(np.abs(exact[finite]), least))
    error, bound = (float(np.linalg.norm(x[finite] - exact[finite])) for x in (got, naive))
    allowed = 1.25 * bound + slack * size
    if error > allowed:
        worst = np.unravel_index(np.argmax(np.where(finite, np.abs(got - np.where(finite, exact, 0)), 0)), exact.shape)
        raise AssertionError(
            f"{name}: relative error {error / (size or 1):.3e}, allowed {allowed / (size or 1):.3e} "
            f"(naive {bound / (size or 1):.3e}); "
            f"the worst at {tuple(map(int, worst))}: expected {exact[worst]:.8g}; got {got[worst]:.8g}"
        )


def _assert_same_specials(name: str, got: np.ndarray, exact: np.ndarray, finite: np.ndarray) -> None:
    wrong = np.argwhere((np.isfinite(got) != finite) | (~finite & ~_equal_with_nan(got, exact)))
    if len(wrong):
        place = tuple(map(int, wrong[0]))
        raise AssertionError(
            f"{name}: {len(wrong)} of {exact.size} NaN or infinities differ, the first at {place}: "
            f"expected {exact[place]:.8g}; got {got[place]:.8g}"
        )


def _equal_with_nan(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x == y) | (np.isnan(x) & np.isnan(y))


def _rounding(dtype: np.dtype) -> float:
    """The largest relative error of one rounding to ``dtype``."""
    return float(ml_dtypes.finfo(dtype).eps) / 2


def _bytes(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _place(byte: int, x: np.ndarray, layout: CacheLayout | None) -> str:
    """Where a byte of ``x`` lies: page, head, field, row and column of records or rows; else an index."""
    if layout is None or x.shape[-1] != layout.shape(0)[-1]:
        return f"{tuple(map(int, np.unravel_index(byte // x.itemsize, x.shape)))}, byte {byte % x.itemsize}"
    *outer, head, offset = map(int, np.unravel_index(byte, x.shape))
    if layout.has_rows:
        name, field = max(layout.fields.items(), key=lambda item: (item[1].offset <= offset, item[1].offset))
        return f"row {(*outer, head)}, field {name}, column {(offset - field.offset) // field.dtype.itemsize}"
    where = f"page {outer[0]}, head {head}, " + (f"pool {outer[1]}, " if len(outer) > 1 else "")
    for name, field in layout.fields.items():
        row, column = divmod(offset - field.offset, field.row_bytes)
        if 0 <= row < layout.page_size:
            return f"{where}field {name}, row {row}, column {column // field.dtype.itemsize}"
    return f"{where}padding, byte {offset} of the record"
