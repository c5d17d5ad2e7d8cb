"""Byte offsets, sizes and names of cache layouts, computed by hand."""

from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from kvq_core import CacheLayout

DESIGN_EXAMPLE = CacheLayout("int8_per_token_head", page_size=16, num_kv_heads=8, head_dim=128)

# The columns are named in the test; a field is its offset and the bytes of a row.
RECORDS = [
    (
        *("int8_per_token_head", 16, 128, None),
        {"k_codes": (0, 128), "v_codes": (2048, 128), "k_scales": (4096, 4), "v_scales": (4160, 4)},
        4224,
    ),
    # 7 rows of scales are 28 bytes and end off the grid: v_scales at 480, not 476.
    (
        *("fp8_per_token_head", 7, 16, 48),
        {"k_codes": (0, 16), "v_codes": (112, 48), "k_scales": (448, 4), "v_scales": (480, 4)},
        512,
    ),
    (
        *("int8_per_token_head", 1, 16, None),
        {"k_codes": (0, 16), "v_codes": (16, 16), "k_scales": (32, 4), "v_scales": (48, 4)},
        64,
    ),
    (
        "bfloat16/int8_per_token_head",
        5,
        32,
        None,
        {"k_codes": (0, 64), "v_codes": (320, 32), "v_scales": (480, 4)},
        512,
    ),
    ("int8_per_token_head/fp8_e5m2", 3, 16, None, {"k_codes": (0, 16), "v_codes": (48, 16), "k_scales": (96, 4)}, 112),
    ("fp8_e4m3", 16, 64, None, {"k_codes": (0, 64), "v_codes": (1024, 64)}, 2048),
    ("float32/float16", 3, 512, 16, {"k_codes": (0, 2048), "v_codes": (6144, 32)}, 6240),
]


# The fields of a row, its bytes.
ROWS = [
    (
        *("int8_per_token_head", 16, 128, None),
        {"k_codes": (0, 128), "k_scales": (128, 4), "v_codes": (132, 128), "v_scales": (260, 4)},
        264,
    ),
    (
        *("bfloat16/fp8_per_token_head", 5, 32, 16),
        {"k_codes": (0, 64), "v_codes": (64, 16), "v_scales": (80, 4)},
        84,
    ),
    ("int8_per_token_head/fp8_e5m2", 1, 16, 48, {"k_codes": (0, 16), "k_scales": (16, 4), "v_codes": (20, 48)}, 68),
    ("float32/float16", 3, 512, 16, {"k_codes": (0, 2048), "v_codes": (2048, 32)}, 2080),
]


def make_layout(kv_cache_dtype="int8_per_token_head", **changes):
    return CacheLayout(kv_cache_dtype, **{"page_size": 16, "num_kv_heads": 8, "head_dim": 128, **changes})


@pytest.mark.parametrize(("kv_cache_dtype", "page_size", "head_dim", "head_dim_v", "fields", "record_bytes"), RECORDS)
def test_fields_lie_where_the_format_says(kv_cache_dtype, page_size, head_dim, head_dim_v, fields, record_bytes):
    layout = CacheLayout(kv_cache_dtype, page_size=page_size, num_kv_heads=3, head_dim=head_dim, head_dim_v=head_dim_v)
    found = {name: (field.offset, field.row_bytes) for name, field in layout.fields.items()}
    assert list(found.items()) == list(fields.items())
    assert layout.record_bytes == record_bytes
    assert layout.page_bytes == 3 * record_bytes
    assert layout.bytes_per_token == 3 * record_bytes / page_size
    assert layout.shape(9) == (9, 3, record_bytes)


@pytest.mark.parametrize(("kv_cache_dtype", "page_size", "head_dim", "head_dim_v", "fields", "row_bytes"), ROWS)
def test_fields_of_a_row_container_lie_side_by_side(kv_cache_dtype, page_size, head_dim, head_dim_v, fields, row_bytes):
    sizes = {"page_size": page_size, "num_kv_heads": 3, "head_dim": head_dim, "head_dim_v": head_dim_v}
    layout = CacheLayout(kv_cache_dtype, **sizes, scale_placement="row")
    found = {name: (field.offset, field.row_bytes) for name, field in layout.fields.items()}
    assert list(found.items()) == list(fields.items())
    assert layout.row_bytes == row_bytes
    assert layout.bytes_per_token == 3 * row_bytes
    assert layout.page_bytes == 3 * page_size * row_bytes
    assert (layout.shape(9), layout.head_axis) == ((9, 3, page_size, row_bytes), 1)
    slots_first = CacheLayout(kv_cache_dtype, **sizes, scale_placement="row", row_order="NHD")
    assert (slots_first.shape(9), slots_first.head_axis) == ((9, page_size, 3, row_bytes), 2)
    assert slots_first.fields == layout.fields


def test_fields_know_their_dtypes():
    layout = make_layout("bfloat16/fp8_per_token_head")
    assert {name: field.dtype for name, field in layout.fields.items()} == {
        "k_codes": np.dtype(ml_dtypes.bfloat16),
        "v_codes": np.dtype(ml_dtypes.float8_e4m3fn),
        "v_scales": np.dtype("<f4"),
    }


def test_fingerprint_of_the_design_example():
    layout = make_layout("int8_per_token_head/fp8_per_token_head")
    assert layout.fingerprint() == "kvq1-tail-k:int8_per_token_head-v:fp8_per_token_head-p16-h8-dk128-dv128"


@pytest.mark.parametrize(
    "layout",
    [
        make_layout(),
        make_layout("fp8/bfloat16", page_size=7),
        make_layout("float16", head_dim=64, head_dim_v=512),
        make_layout(scale_placement="row"),
        make_layout("int8_per_token_head/fp8", scale_placement="row", row_order="NHD"),
    ],
)
def test_layout_comes_back_from_its_fingerprint(layout):
    assert CacheLayout.from_fingerprint(layout.fingerprint()) == layout


def test_fingerprints_of_row_containers_name_their_order():
    heads_first, slots_first = (make_layout(scale_placement="row", row_order=order) for order in ("HND", "NHD"))
    sides = "k:int8_per_token_head-v:int8_per_token_head"
    assert heads_first.fingerprint() == f"kvq1-row-{sides}-p16-h8-dk128-dv128"
    assert slots_first.fingerprint() == f"kvq1-row-{sides}-p16-h8-dk128-dv128-NHD"


@pytest.mark.parametrize(
    "changes",
    [{"page_size": 17}, {"num_kv_heads": 4}, {"head_dim": 64, "head_dim_v": 128}, {"head_dim_v": 64}],
)
def test_every_size_is_in_the_fingerprint(changes):
    assert make_layout(**changes).fingerprint() != DESIGN_EXAMPLE.fingerprint()


@pytest.mark.parametrize(
    "fingerprint",
    [
        "",
        "kvq2-tail-k:float16-v:float16-p16-h8-dk128-dv128",
        "kvq1-head-k:float16-v:float16-p16-h8-dk128-dv128",
        "kvq1-tail-k:float16-v:float16-p16-h8-dk128-dv128-NHD",
        "kvq1-row-k:float16-v:float16-p16-h8-dk128-dv128-HND",
        "kvq1-tail-k:float16-v:float16-p16-h8-dk128",
        "kvq1-tail-k:float16-v:float16-p16-h8-dk128-dv128\n",
        "kvq1-tail-k:int4-v:float16-p16-h8-dk128-dv128",
        "kvq1-tail-k:float16-v:float16-p0-h8-dk128-dv128",
    ],
)
def test_malformed_fingerprint_is_refused(fingerprint):
    with pytest.raises(ValueError, match="expected"):
        CacheLayout.from_fingerprint(fingerprint)


@pytest.mark.parametrize(
    ("name", "compute_dtype", "canonical"),
    [
        ("fp8", None, "fp8_e4m3"),
        ("fp8_e4m3/fp8", None, "fp8_e4m3"),
        ("fp8/fp8_e5m2", None, "fp8_e4m3/fp8_e5m2"),
        ("auto", "bfloat16", "bfloat16"),
        ("auto", "torch.float16", "float16"),
        ("auto", np.float32, "float32"),
        ("auto", np.dtype(np.float16), "float16"),
        ("auto", ml_dtypes.bfloat16, "bfloat16"),
        ("auto/int8_per_token_head", "float16", "float16/int8_per_token_head"),
    ],
)
def test_names_are_resolved_so_that_equal_layouts_are_equal(name, compute_dtype, canonical):
    layout = make_layout(name, compute_dtype=compute_dtype)
    assert layout == make_layout(canonical)
    assert hash(layout) == hash(make_layout(canonical))
    assert layout.kv_cache_dtype == canonical


def test_layout_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DESIGN_EXAMPLE.page_size = 32


def test_shard_holds_its_part_of_the_kv_heads():
    shard = DESIGN_EXAMPLE.shard(4)
    assert shard == make_layout(num_kv_heads=2)
    assert shard.record_bytes == DESIGN_EXAMPLE.record_bytes
    assert DESIGN_EXAMPLE.shard(1) == DESIGN_EXAMPLE
    rows = {"scale_placement": "row", "row_order": "NHD"}
    assert make_layout(**rows).shard(4) == make_layout(num_kv_heads=2, **rows)


@pytest.mark.parametrize("num_shards", [3, 16, 0, -2])
def test_shard_refuses_what_does_not_divide_the_kv_heads(num_shards):
    with pytest.raises(ValueError, match=f"num_kv_heads=8.*num_shards={num_shards}"):
        DESIGN_EXAMPLE.shard(num_shards)


@pytest.mark.parametrize("name", ["page_size", "num_kv_heads", "head_dim", "head_dim_v"])
@pytest.mark.parametrize("value", [0, -16, 16.0, True, "16"])
def test_counts_are_integers_from_1(name, value):
    with pytest.raises(ValueError, match=f"expected {name} .*got {value!r}"):
        make_layout(**{name: value})


def test_numpy_integers_are_counts_and_do_not_leak_into_the_layout():
    layout = make_layout(page_size=np.int64(16))
    assert layout == DESIGN_EXAMPLE
    assert type(layout.page_size) is int


@pytest.mark.parametrize("name", ["head_dim", "head_dim_v"])
@pytest.mark.parametrize("value", [8, 100, 528])
def test_unsupported_head_dim_is_not_implemented(name, value):
    with pytest.raises(NotImplementedError, match=f"expected {name} .*16 to 512; got {value}"):
        make_layout(**{name: value})


@pytest.mark.parametrize(
    ("kv_cache_dtype", "changes", "message"),
    [
        ("int4", {}, "got 'int4'"),
        ("fp8/fp8/fp8", {}, "3 parts"),
        ("auto", {}, "pass compute_dtype"),
        ("auto", {"compute_dtype": "fp8"}, "got 'fp8'"),
        ("auto", {"compute_dtype": "float64"}, "got 'float64'"),
        ("fp8", {"scale_placement": "head"}, "got 'head'"),
        ("fp8", {"scale_placement": "row", "row_order": "nhd"}, "'HND' or 'NHD'; got 'nhd'"),
        ("fp8", {"row_order": "NHD"}, "scale_placement='tail'; got 'NHD'"),
    ],
)
def test_malformed_layout_is_refused(kv_cache_dtype, changes, message):
    with pytest.raises(ValueError, match=message):
        make_layout(kv_cache_dtype, **changes)
