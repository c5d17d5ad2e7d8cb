"""Every refusal of a malformed call says what was expected, what came, and is raised before anything is read."""

from __future__ import annotations

import dataclasses
import functools
import math

import pytest

from kvq_core import CacheLayout
from kvq_core.arguments import (
    ArraySpec,
    AttentionCall,
    check_append_kv,
    check_copy_pages,
    check_gather_kv,
    check_paged_attention,
)

LAYOUT = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=64, head_dim_v=32)
RECORD = LAYOUT.record_bytes  # 1664


def dense(dtype, *shape):
    return ArraySpec(dtype, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))


PAGES = dense("uint8", 10, 8, RECORD)
APPEND = {
    "pages": PAGES,
    "k": dense("bfloat16", 5, 8, 64),
    "v": dense("float16", 5, 8, 32),
    "slot_mapping": dense("int64", 5),
}
GATHER = {"pages": PAGES, "page_table": dense("int32", 3, 4), "seq_lens": dense("int32", 3), "dtype": "bfloat16"}
COPY = {"pages": PAGES, "src": dense("int32", 2), "dst": dense("int64", 2)}
ROWS = CacheLayout(
    "int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=64, head_dim_v=32, scale_placement="row"
)
SLOTS_FIRST = dataclasses.replace(ROWS, row_order="NHD", compute_dtype=None)
ROW = ROWS.row_bytes  # 104
ATTENTION = {
    "q": dense("bfloat16", 7, 24, 64),
    "pages": PAGES,
    "page_table": dense("int32", 3, 4),
    "seq_lens": dense("int32", 3),
    "cu_seqlens_q": dense("int32", 4),
}


def append(**changes):
    check_append_kv(LAYOUT, **(APPEND | changes))


def append_rows(layout=ROWS, **changes):
    check_append_kv(layout, **(APPEND | {"pages": dense("uint8", *layout.shape(10))} | changes))


def row_pages(*strides):
    return ArraySpec("uint8", (10, 8, 16, ROW), strides)


def gather(**changes):
    check_gather_kv(LAYOUT, **(GATHER | changes))


def copy(**changes):
    check_copy_pages(**(COPY | changes))


def attend(**changes):
    check_paged_attention(LAYOUT, AttentionCall(**(ATTENTION | changes)))


PADDED_PAGES = ArraySpec("uint8", (10, 8, RECORD), (8 * RECORD + 16, RECORD, 1))
ONE_PAGE = ArraySpec("uint8", (1, 8, RECORD), (0, RECORD, 1))
LOCAL_PAGES = dense("uint8", 10, 2, RECORD)


@pytest.mark.parametrize(
    ("check", "changes"),
    [
        (append, {}),
        (append, {"pages": PADDED_PAGES}),
        (append, {"pages": ONE_PAGE}),
        (append, {"pages": dense("uint8", 0, 8, RECORD)}),
        (append, {"pages": ArraySpec("uint8", (0, 8, RECORD), (0, 0, 0))}),
        (append, {"k": ArraySpec("float32", (5, 8, 64), (0, 0, 1)), "slot_mapping": dense("int32", 5)}),
        (append, {"k": ArraySpec("float32", (5, 8, 64), (64, 1000, 1))}),
        (append, {"pages": LOCAL_PAGES, "k": dense("float32", 5, 2, 64), "v": dense("float32", 5, 2, 32)}),
        (
            append,
            {"k": dense("float32", 0, 8, 64), "v": dense("float32", 0, 8, 32), "slot_mapping": dense("int32", 0)},
        ),
        (gather, {}),
        (gather, {"page_table": dense("int32", 0, 4), "seq_lens": dense("int32", 0)}),
        (gather, {"page_table": dense("int32", 3, 0)}),
        (gather, {"page_table": ArraySpec("int32", (1, 4), (99, 1)), "seq_lens": dense("int32", 1)}),
        (append_rows, {}),
        (functools.partial(append_rows, SLOTS_FIRST), {}),
        (append_rows, {"pages": row_pages(16 * 8 * ROW, ROW, 8 * ROW, 1)}),  # slots before heads
        (append_rows, {"pages": row_pages(16 * 8 * ROW + 4, 16 * ROW, ROW, 1)}),  # padded pages
        (append_rows, {"pages": row_pages(16 * ROW, 160 * ROW, ROW, 1)}),  # heads before pages
        (append_rows, {"pages": row_pages(8 * ROW, ROW, 80 * ROW, 1)}),  # slots before pages
        (append_rows, {"pages": ArraySpec("uint8", (1, 8, 16, ROW), (0, 16 * ROW, ROW, 1))}),
        (append_rows, {"pages": ArraySpec("uint8", (0, 8, 16, ROW), (0, 0, 0, 0))}),
        (copy, {}),
        (copy, {"pages": dense("uint8", 10, 8, 16, ROW)}),
        (copy, {"src": dense("int64", 0), "dst": dense("int64", 0)}),
        (attend, {}),
        (attend, {"q": dense("float32", 3, 8, 64), "cu_seqlens_q": None}),
        (attend, {"q": ArraySpec("float32", (0, 8, 64), (0, 0, 0))}),
        (attend, {"pages": LOCAL_PAGES, "q": dense("bfloat16", 7, 6, 64)}),
        (attend, {"sinks": dense("float32", 24), "alibi_slopes": dense("float32", 24), "causal": False}),
        (attend, {"window": 1, "softcap": 30, "sm_scale": -0.5, "max_seqlen_q": 3}),
    ],
)
def test_well_formed_call_passes(check, changes):
    check(**changes)


@pytest.mark.parametrize(
    ("check", "changes", "expected", "got"),
    [
        (append, {"pages": dense("int8", 10, 8, RECORD)}, "pages of dtype uint8", "int8. View its bytes as uint8"),
        (append, {"k": dense("float64", 5, 8, 64)}, "k of dtype bfloat16 or float16 or float32", "float64"),
        (append, {"v": dense("int8", 5, 8, 32)}, "v of dtype bfloat16", "int8"),
        (append, {"slot_mapping": dense("uint32", 5)}, "slot_mapping of dtype int32 or int64", "uint32"),
        (gather, {"page_table": dense("int64", 3, 4)}, "page_table of dtype int32", "int64"),
        (gather, {"seq_lens": dense("int64", 3)}, "seq_lens of dtype int32", "int64"),
        (gather, {"dtype": "float64"}, "the result to be bfloat16 or float16 or float32", "'float64'"),
        (copy, {"src": dense("float32", 2)}, "src of dtype int32 or int64", "float32"),
        (copy, {"dst": dense("uint8", 2)}, "dst of dtype int32 or int64", "uint8"),
        (attend, {"q": dense("int8", 7, 24, 64)}, "q of dtype bfloat16", "int8"),
        (attend, {"cu_seqlens_q": dense("int64", 4)}, "cu_seqlens_q of dtype int32", "int64"),
        (attend, {"sinks": dense("bfloat16", 24)}, "sinks of dtype float32", "bfloat16"),
        (attend, {"alibi_slopes": dense("float64", 24)}, "alibi_slopes of dtype float32", "float64"),
        (attend, {"causal": 1}, "causal to be True or False", "1"),
        (attend, {"max_seqlen_q": 2.0}, "max_seqlen_q to be None or a Python integer", "2.0"),
        (attend, {"window": True}, "window to be None or a Python integer", "True"),
        (attend, {"softcap": "30"}, "softcap to be None or a Python number", "'30'"),
        (attend, {"sm_scale": 1j}, "sm_scale to be None or a Python number", "1j"),
    ],
)
def test_wrong_type_is_a_type_error(check, changes, expected, got):
    with pytest.raises(TypeError) as error:
        check(**changes)
    assert_message(error, expected, got)


@pytest.mark.parametrize(
    ("check", "changes", "expected", "got"),
    [
        (append, {"pages": dense("uint8", 10, 8)}, f"[num_pages, num_kv_heads, record_bytes={RECORD}]", "[10, 8]"),
        (append, {"pages": dense("uint8", 10, 8, 2048)}, f"record_bytes={RECORD}]", "[10, 8, 2048]"),
        (append, {"pages": dense("uint8", 10, 3, RECORD)}, "num_kv_heads=8 of the layout", "3"),
        (append, {"pages": dense("uint8", 10, 16, RECORD)}, "num_kv_heads=8 of the layout", "16"),
        (append, {"pages": dense("uint8", 10, 0, RECORD)}, "num_kv_heads=8 of the layout", "0"),
        (append, {"k": dense("float32", 5, 64)}, "k of shape [num_tokens, num_kv_heads=8, head_dim=64]", "[5, 64]"),
        (append, {"k": dense("float32", 5, 4, 64)}, "num_kv_heads=8", "[5, 4, 64]"),
        (append, {"k": dense("float32", 5, 8, 32)}, "head_dim=64", "[5, 8, 32]"),
        (append, {"v": dense("float32", 5, 8, 64)}, "head_dim_v=32", "[5, 8, 64]"),
        (append, {"v": dense("float32", 4, 8, 32)}, "as many tokens in v as in k, 5", "4"),
        (append, {"slot_mapping": dense("int64", 6)}, "slot_mapping of shape [num_tokens=5]", "[6]"),
        (append, {"slot_mapping": dense("int64", 5, 1)}, "slot_mapping of shape [num_tokens=5]", "[5, 1]"),
        (gather, {"page_table": dense("int32", 12)}, "page_table of shape [num_seqs, max_pages]", "[12]"),
        (gather, {"seq_lens": dense("int32", 4)}, "seq_lens of shape [num_seqs=3]", "[4]"),
        (copy, {"dst": dense("int32", 3)}, "dst of shape [num_pairs=2]", "[3]"),
        (copy, {"src": dense("int32", 2, 1)}, "src of shape [num_pairs]", "[2, 1]"),
        (
            append_rows,
            {"pages": dense("uint8", 10, 16, 8, ROW)},
            f"[num_pages, num_kv_heads, page_size=16, row_bytes={ROW}]",
            f"[10, 16, 8, {ROW}]",
        ),
        (append_rows, {"pages": PAGES}, f"row_bytes={ROW}]", f"[10, 8, {RECORD}]"),
        (append_rows, {"pages": dense("uint8", 10, 3, 16, ROW)}, "num_kv_heads=8 of the layout", "3"),
        (
            functools.partial(append_rows, SLOTS_FIRST),
            {"pages": dense("uint8", 10, 8, 16, ROW)},
            f"[num_pages, page_size=16, num_kv_heads, row_bytes={ROW}]",
            f"[10, 8, 16, {ROW}]",
        ),
        (copy, {"pages": dense("uint8", 10, 8, 16, 102)}, "row_bytes to be a multiple of 4", "102"),
        (copy, {"pages": dense("uint8", 10, 8, 100)}, "record_bytes to be a multiple of 16", "100"),
        (copy, {"pages": dense("uint8", 10, 8, 0)}, "record_bytes to be a multiple of 16", "0"),
        (attend, {"q": dense("float32", 7, 24, 128)}, "[num_q_tokens, num_q_heads, head_dim=64]", "[7, 24, 128]"),
        (attend, {"q": dense("float32", 7, 12, 64)}, "a multiple of the 8 KV heads", "12"),
        (attend, {"q": dense("float32", 7, 0, 64)}, "a multiple of the 8 KV heads", "0"),
        (attend, {"cu_seqlens_q": None}, "one query per sequence, 3, without cu_seqlens_q", "num_q_tokens=7"),
        (attend, {"cu_seqlens_q": dense("int32", 3)}, "cu_seqlens_q of shape [num_seqs + 1=4]", "[3]"),
        (attend, {"seq_lens": dense("int32", 2)}, "seq_lens of shape [num_seqs=3]", "[2]"),
        (attend, {"sinks": dense("float32", 8)}, "sinks of shape [num_q_heads=24]", "[8]"),
        (attend, {"alibi_slopes": dense("float32", 1, 24)}, "alibi_slopes of shape [num_q_heads=24]", "[1, 24]"),
        (attend, {"max_seqlen_q": 0}, "max_seqlen_q to be None or an integer from 1", "0"),
        (attend, {"window": -1}, "window to be None or an integer from 1", "-1"),
        (attend, {"softcap": 0.0}, "softcap above 0", "0.0"),
        (attend, {"softcap": math.inf}, "softcap to be finite", "inf"),
        (attend, {"sm_scale": math.nan}, "sm_scale to be finite", "nan"),
    ],
)
def test_wrong_shape_or_number_is_a_value_error(check, changes, expected, got):
    with pytest.raises(ValueError) as error:
        check(**changes)
    assert_message(error, expected, got)


@pytest.mark.parametrize(
    ("check", "changes", "expected", "got"),
    [
        (
            append,
            {"pages": ArraySpec("uint8", (10, 8, RECORD), (16 * RECORD, 2 * RECORD, 1))},
            "contiguous records",
            "",
        ),
        (append, {"pages": ArraySpec("uint8", (10, 8, RECORD), (16 * RECORD, RECORD, 2))}, "contiguous records", ""),
        (append, {"pages": ArraySpec("uint8", (10, 8, RECORD), (0, RECORD, 1))}, f"at least {8 * RECORD} bytes", "0"),
        (
            append,
            {"pages": ArraySpec("uint8", (10, 8, RECORD), (8 * RECORD + 8, RECORD, 1))},
            "a multiple of 16",
            f"{8 * RECORD + 8}",
        ),
        (
            append_rows,
            {"pages": row_pages(32 * 8 * ROW, 32 * ROW, 2 * ROW, 2)},
            "contiguous rows, last stride 1",
            "",
        ),
        (
            append_rows,
            {"pages": row_pages(16 * 8 * ROW + 2, 16 * ROW, ROW, 1)},
            "multiples of 4",
            f"({16 * 8 * ROW + 2}",
        ),
        (append_rows, {"pages": row_pages(0, 16 * ROW, ROW, 1)}, f"not overlap, strides of at least {ROW}", "0"),
        (append_rows, {"pages": row_pages(16 * 8 * ROW, 16 * ROW, ROW - 4, 1)}, f"at least {ROW} bytes", f"{ROW - 4}"),
        (
            append_rows,
            {"pages": row_pages(16 * 8 * ROW - 8, 16 * ROW, ROW, 1)},
            f"at least {16 * 8 * ROW} bytes",
            f"{16 * 8 * ROW - 8}",
        ),
        (append, {"k": ArraySpec("float32", (5, 8, 64), (1024, 128, 2))}, "k with a contiguous last axis", ""),
        (append, {"v": ArraySpec("float32", (5, 8, 32), (1, 5, 40))}, "v with a contiguous last axis", "(1, 5, 40)"),
        (append, {"slot_mapping": ArraySpec("int32", (5,), (2,))}, "slot_mapping to be contiguous", "(2,)"),
        (gather, {"page_table": ArraySpec("int32", (3, 4), (8, 1))}, "page_table to be contiguous", "(8, 1)"),
        (gather, {"seq_lens": ArraySpec("int32", (3,), (0,))}, "seq_lens to be contiguous", "(0,)"),
        (copy, {"src": ArraySpec("int32", (2,), (-1,))}, "src to be contiguous", "(-1,)"),
        (attend, {"q": ArraySpec("float32", (7, 24, 64), (1, 7, 168))}, "q with a contiguous last axis", "(1, 7, 168)"),
        (attend, {"sinks": ArraySpec("float32", (24,), (2,))}, "sinks to be contiguous", "(2,)"),
    ],
)
def test_wrong_stride_is_a_value_error_with_a_way_out(check, changes, expected, got):
    with pytest.raises(ValueError) as error:
        check(**changes)
    assert_message(error, expected, got)
    ways_out = (".contiguous()", "Slice a pool", "page stride", "View a container", "Copy a view")
    assert any(way_out in str(error.value) for way_out in ways_out)


def assert_message(error, expected, got):
    message = str(error.value)
    assert message.startswith("expected ")
    wanted, came = message.split("; got ", 1)
    assert expected in wanted
    assert got in came
