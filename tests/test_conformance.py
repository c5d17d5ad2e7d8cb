"""Every case on every backend: the bytes of the reference, and attention within the rule of DESIGN.md section 4."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from kvq_core import reference
from tests import backends, cases, mla_cases
from tests import inputs as make
from tests.compare import Attention, assert_no_worse_than_naive, assert_same_bytes, with_one_nan
from tests.naive import naive_attention

TORCH_GPU, JAX_GPU, _ = backends.ON_GPU
APPEND_CASES = cases.APPEND_CASES + mla_cases.APPEND_CASES
GATHER_CASES = cases.GATHER_CASES + mla_cases.GATHER_CASES
ATTENTION_CASES = cases.ATTENTION_CASES + mla_cases.ATTENTION_CASES


def on_backends(all_cases):
    """Parametrize over backends and the cases that each takes on."""
    params = [
        pytest.param(backend, case, id=f"{backend.name}-{case.name}", marks=backends.marks_of(backend))
        for backend in backends.ALL
        for case in all_cases
        if backends.takes_on(backend, case)
    ]
    return pytest.mark.parametrize(("backend", "case"), params)


def _skip_if_strided(backend, case) -> None:
    if backends.lacks_strides(backend, case):
        pytest.skip("JAX arrays are dense: without strides this is a case of its own")


@on_backends(APPEND_CASES)
def test_append_writes_the_bytes_of_the_reference_and_no_others(backend, case):
    _skip_if_strided(backend, case)
    inputs, scales = case.inputs(), (case.k_scale, case.v_scale)
    got = backend.append(case.layout, *inputs, scales)
    slots = inputs.slots
    if case.slots == "duplicates":
        slots = _slots_of_winners(case, inputs, scales, got)
    want = backends.NUMPY.append(case.layout, *inputs._replace(slots=slots), scales)
    _assert_same_pools(got, want, case.layout)


def _assert_same_pools(got, want, layout):
    """Equal bytes of the pools, what lies between the pages included."""
    whole = make.root(want)
    assert_same_bytes(make.root(got).reshape(whole.shape), whole, layout)


def _slots_of_winners(case, inputs, scales, got):
    """The slots, -1 for tokens that lost theirs: of each slot's tokens, one whose row the slot holds whole."""
    winners = np.full_like(inputs.slots, -1)
    for slot in np.unique(inputs.slots[inputs.slots >= 0]):
        for token in np.flatnonzero(inputs.slots == slot):
            only = np.where(np.arange(len(winners)) == token, slot, -1).astype(winners.dtype)
            want = backends.NUMPY.append(case.layout, *inputs._replace(slots=only), scales)
            if _same_slot(case.layout, got, want, int(slot)):
                winners[token] = slot
                break
        else:
            raise AssertionError(f"slot {slot} holds none of its tokens whole")
    return winners


def _same_slot(layout, got, want, slot) -> bool:
    page, row = divmod(slot, layout.page_size)
    return all(
        np.array_equal(*(reference.record_field(layout, x, name)[page, :, row].view(np.uint8) for x in (got, want)))
        for name in layout.fields
    )


@on_backends(GATHER_CASES)
def test_gather_reads_the_values_of_the_reference(backend, case):
    _skip_if_strided(backend, case)
    args = (case.layout, *case.inputs(), case.dtype, (case.k_scale, case.v_scale))
    for got, want in zip(backend.gather(*args), backends.NUMPY.gather(*args), strict=True):
        assert_same_bytes(with_one_nan(got), with_one_nan(want))


@on_backends(cases.COPY_CASES)
def test_copy_pages_moves_whole_pages_and_nothing_else(backend, case):
    _skip_if_strided(backend, case)
    inputs = case.inputs()
    got, want = (b.copy_pages(case.layout, *inputs) for b in (backend, backends.NUMPY))
    _assert_same_pools(got, want, case.layout)


@functools.cache
def _expected(case):
    inputs = case.inputs()
    return backends.NUMPY.attention(case.layout, inputs, case.options()), Attention(*naive_attention(case, inputs))


@on_backends(ATTENTION_CASES)
def test_attention_is_no_worse_than_naive(backend, case):
    _skip_if_strided(backend, case)
    got = backend.attention(case.layout, case.inputs(), case.options())
    assert_no_worse_than_naive(got, *_expected(case))


@on_backends(cases.MERGE_CASES)
def test_attention_in_parts_merges_into_that_of_the_whole(backend, case):
    parts = [backend.attention(case.layout, *part) for part in case.parts()]
    got = backend.merge_states([part.out for part in parts], [part.lse for part in parts])
    assert_no_worse_than_naive(got, *_expected(case.whole))


@pytest.mark.gpu
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=lambda case: case.name)
def test_torch_and_jax_attend_with_equal_bits_on_one_gpu(case):
    inputs = case.inputs()
    for got, want in zip(
        *(backend.attention(case.layout, inputs, case.options()) for backend in (JAX_GPU, TORCH_GPU)), strict=True
    ):
        assert_same_bytes(got, want)
