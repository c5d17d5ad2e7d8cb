"""Byte offsets, sizes and names of MLA layouts, computed by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kvq_core import CacheLayout, MLALayout
from kvq_core.arguments import ArraySpec
from kvq_core.mla import MLA_MODES, layout_from_fingerprint
from kvq_core.plan.launch import DeviceFacts, pool_spec

# mode, page size, rank, rope dim, fields (offset, bytes of a row), record
RECORDS = [
    (
        *("int8_per_token_head", 64, 512, 64),
        {"latent_codes": (0, 512), "rope_codes": (32768, 128), "latent_scales": (40960, 4)},
        41216,
    ),
    # 7 rows of scales are 28 bytes and end off the grid.
    (
        *("fp8_per_token_head", 7, 48, 16),
        {"latent_codes": (0, 48), "rope_codes": (336, 32), "latent_scales": (560, 4)},
        592,
    ),
    ("fp8_e4m3", 64, 512, 64, {"latent_codes": (0, 512), "rope_codes": (32768, 64)}, 36864),
    ("bfloat16", 16, 512, 64, {"latent_codes": (0, 1024), "rope_codes": (16384, 128)}, 18432),
]


def make_layout(kv_cache_dtype="int8_per_token_head", **changes):
    return MLALayout(kv_cache_dtype, **{"page_size": 64, **changes})


@pytest.mark.parametrize(("mode", "page_size", "rank", "rope_dim", "fields", "record_bytes"), RECORDS)
def test_fields_lie_where_the_format_says(mode, page_size, rank, rope_dim, fields, record_bytes):
    layout = MLALayout(mode, page_size=page_size, kv_lora_rank=rank, rope_dim=rope_dim)
    assert {name: (field.offset, field.row_bytes) for name, field in layout.fields.items()} == fields
    assert list(layout.fields) == list(fields)
    assert layout.record_bytes == layout.page_bytes == record_bytes
    assert layout.bytes_per_token == record_bytes / page_size
    assert layout.shape(9) == (9, 1, record_bytes)


def test_fields_know_their_dtypes():
    assert {name: field.dtype for name, field in make_layout("fp8_per_token_head").fields.items()} == {
        "latent_codes": np.dtype(ml_dtypes.float8_e4m3fn),
        "rope_codes": np.dtype(ml_dtypes.bfloat16),
        "latent_scales": np.dtype("<f4"),
    }


def test_dimensions_are_those_of_deepseek_if_not_given():
    assert make_layout() == make_layout(kv_lora_rank=512, rope_dim=64)
    assert make_layout().bytes_per_token == 644


@pytest.mark.parametrize("mode", MLA_MODES)
def test_a_record_is_that_of_one_kv_head_with_the_rope_part_as_v(mode):
    layout = make_layout(mode, page_size=5, kv_lora_rank=48, rope_dim=32)
    records = layout.records
    assert isinstance(records, CacheLayout)
    assert (records.num_kv_heads, records.head_dim, records.head_dim_v) == (1, 48, 32)
    assert (records.k_mode, records.v_mode) == (layout.mode, layout.rope_mode)
    assert list(records.fields.values()) == list(layout.fields.values())


def test_fingerprint():
    assert make_layout().fingerprint() == "kvq1-mla-latent:int8_per_token_head-rope:bfloat16-p64-dl512-dr64"
    assert make_layout("fp8").fingerprint() == "kvq1-mla-latent:fp8_e4m3-rope:fp8_e4m3-p64-dl512-dr64"


@pytest.mark.parametrize("mode", MLA_MODES)
def test_layout_comes_back_from_its_fingerprint(mode):
    layout = make_layout(mode, page_size=7, kv_lora_rank=256, rope_dim=32)
    assert MLALayout.from_fingerprint(layout.fingerprint()) == layout
    assert layout_from_fingerprint(layout.fingerprint()) == layout
    assert layout_from_fingerprint(layout.records.fingerprint()) == layout.records


@pytest.mark.parametrize("changes", [{"page_size": 16}, {"kv_lora_rank": 256}, {"rope_dim": 32}])
def test_every_size_is_in_the_fingerprint(changes):
    assert make_layout(**changes).fingerprint() != make_layout().fingerprint()


@pytest.mark.parametrize(
    "fingerprint",
    [
        "",
        "kvq2-mla-latent:bfloat16-rope:bfloat16-p64-dl512-dr64",
        "kvq1-mla-latent:bfloat16-rope:fp8_e4m3-p64-dl512-dr64",
        "kvq1-mla-latent:int8_per_token_head-rope:int8_per_token_head-p64-dl512-dr64",
        "kvq1-mla-latent:bfloat16-rope:bfloat16-p64-dl512",
        "kvq1-mla-latent:bfloat16-rope:bfloat16-p0-dl512-dr64",
        "kvq1-tail-k:float16-v:float16-p16-h8-dk128-dv128",
    ],
)
def test_malformed_fingerprint_is_refused(fingerprint):
    with pytest.raises(ValueError, match="expected"):
        MLALayout.from_fingerprint(fingerprint)


def test_kinds_of_caches_do_not_take_each_others_fingerprints():
    with pytest.raises(ValueError, match="expected a fingerprint like"):
        CacheLayout.from_fingerprint(make_layout().fingerprint())


def test_aliases_are_resolved_so_that_equal_layouts_are_equal():
    assert make_layout("fp8") == make_layout("fp8_e4m3")
    assert hash(make_layout("fp8")) == hash(make_layout("fp8_e4m3"))
    assert type(make_layout(page_size=np.int64(64)).page_size) is int


@pytest.mark.parametrize("name", ["page_size", "kv_lora_rank", "rope_dim"])
@pytest.mark.parametrize("value", [0, -16, 16.0, True, "16"])
def test_counts_are_integers_from_1(name, value):
    with pytest.raises(ValueError, match=f"expected {name} .*got {value!r}"):
        make_layout(**{name: value})


@pytest.mark.parametrize("name", ["kv_lora_rank", "rope_dim"])
@pytest.mark.parametrize("value", [8, 100, 528])
def test_unsupported_dimension_is_not_implemented(name, value):
    with pytest.raises(NotImplementedError, match=f"expected {name} .*16 to 512; got {value}"):
        make_layout(**{name: value})


@pytest.mark.parametrize("mode", ["float16", "float32", "fp8_e5m2"])
def test_other_modes_are_not_implemented(mode):
    with pytest.raises(NotImplementedError, match=f"expected an MLA cache in a mode of .*got '{mode}'"):
        make_layout(mode)


@pytest.mark.parametrize(("mode", "message"), [("int4", "got 'int4'"), ("bfloat16/bfloat16", "pair"), ("auto", "auto")])
def test_names_that_are_no_mode_are_refused(mode, message):
    with pytest.raises(ValueError, match=message):
        make_layout(mode)


@pytest.mark.parametrize(("page_size", "is_wide"), [(3_728_192, False), (3_728_384, True)])
def test_a_rope_part_further_into_a_record_than_an_int32_counts_is_addressed_with_64_bits(page_size, is_wide):
    """The latents of such a record still end before."""
    layout = MLALayout("fp8_e4m3", page_size=page_size)
    shape = layout.shape(2)
    pages = ArraySpec("uint8", shape, (shape[1] * shape[2], shape[2], 1))
    records = pool_spec(layout.records, pages, DeviceFacts("cuda", 90, 132))
    assert (records.k.is_wide, records.v.is_wide) == (False, is_wide)
