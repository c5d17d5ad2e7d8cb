"""The golden files hold the bytes of format version 1: the reference still makes them, and so does every backend."""

from __future__ import annotations

import pytest

from kvq_core.mla import MLA_MODES
from tests import backends, cases
from tests.compare import assert_same_bytes
from tests.golden import mla, regenerate

DIGEST = "b73f5165286b1bc3442fd5775c60bb0b5e3b3be399513ac0d0be491a682c9d68"
ROW_DIGEST = "b492c0544c50d71b54fec420ff9865912354be96765edc4a2ecf3a35695d2cbc"
GOLDEN = regenerate.load_golden()
MLA_DIGEST = "9ecd8cc160e2fe7337175390c46e63f1e81c9311035e3dc099d8323bf916b5cc"
MLA_GOLDEN = mla.load_golden()
GOLDEN_ROWS = regenerate.load_golden(regenerate.ROW_FILE)


@pytest.mark.parametrize(
    ("path", "golden", "digest"),
    [
        (regenerate.FILE, GOLDEN, DIGEST),
        (regenerate.ROW_FILE, GOLDEN_ROWS, ROW_DIGEST),
        (mla.FILE, MLA_GOLDEN, MLA_DIGEST),
    ],
    ids=["records", "rows", "mla"],
)
def test_golden_file_is_the_one_that_was_reviewed_and_is_small(path, golden, digest):
    assert regenerate.digest(golden) == digest
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize(
    ("make_golden", "golden"),
    [(regenerate.make_golden, GOLDEN), (regenerate.make_golden_rows, GOLDEN_ROWS), (mla.make_golden, MLA_GOLDEN)],
    ids=["records", "rows", "mla"],
)
def test_reference_still_makes_the_golden_file(make_golden, golden):
    made = make_golden()
    assert made.keys() == golden.keys()
    for name, array in made.items():
        assert_same_bytes(array, golden[name])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kv_cache_dtype", regenerate.KV_CACHE_DTYPES)
@backends.parametrize_backends
def test_every_backend_makes_the_golden_bytes(backend, kv_cache_dtype, dtype):
    want = GOLDEN[regenerate.name_of(kv_cache_dtype, dtype)]
    got = regenerate.make_pages(backend, GOLDEN, kv_cache_dtype, dtype)
    assert_same_bytes(got, want, regenerate.layout_of(kv_cache_dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("mode", MLA_MODES)
@backends.parametrize_backends
def test_every_backend_makes_the_golden_bytes_of_an_mla_cache(backend, mode, dtype):
    want = MLA_GOLDEN[regenerate.name_of(mode, dtype)]
    assert_same_bytes(mla.make_pages(backend, MLA_GOLDEN, mode, dtype), want, mla.layout_of(mode))


@pytest.mark.parametrize("rows", cases.ROW_ORDERS)
@pytest.mark.parametrize("kv_cache_dtype", regenerate.ROW_KV_CACHE_DTYPES)
@backends.parametrize_backends
def test_every_backend_makes_the_golden_bytes_of_row_containers(backend, kv_cache_dtype, rows):
    want = GOLDEN_ROWS[regenerate.name_of(kv_cache_dtype, "bfloat16", rows)]
    got = regenerate.make_pages(backend, GOLDEN, kv_cache_dtype, "bfloat16", rows)
    assert_same_bytes(got, want, regenerate.layout_of(kv_cache_dtype, rows))
