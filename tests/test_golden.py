"""The golden file holds the bytes of format version 1: the reference still makes them, and so does every backend."""

from __future__ import annotations

import pytest

from tests import backends, cases
from tests.compare import assert_same_bytes
from tests.golden import regenerate

DIGEST = "b73f5165286b1bc3442fd5775c60bb0b5e3b3be399513ac0d0be491a682c9d68"
GOLDEN = regenerate.load_golden()


def test_golden_file_is_the_one_that_was_reviewed_and_is_small():
    assert regenerate.digest(GOLDEN) == DIGEST
    assert regenerate.FILE.stat().st_size < 300_000


def test_reference_still_makes_the_golden_file():
    made = regenerate.make_golden()
    assert made.keys() == GOLDEN.keys()
    for name, array in made.items():
        assert_same_bytes(array, GOLDEN[name])


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kv_cache_dtype", regenerate.KV_CACHE_DTYPES)
@backends.parametrize_backends
def test_every_backend_makes_the_golden_bytes(backend, kv_cache_dtype, dtype):
    want = GOLDEN[regenerate.name_of(kv_cache_dtype, dtype)]
    got = regenerate.make_pages(backend, GOLDEN, kv_cache_dtype, dtype)
    assert_same_bytes(got, want, regenerate.layout_of(kv_cache_dtype))
