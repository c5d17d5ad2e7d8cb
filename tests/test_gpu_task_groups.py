"""`kvq_core.kernels.groups` in few programs, so that each takes many tiles: on a whole GPU only large cases would."""

from __future__ import annotations

import dataclasses
import functools
from unittest import mock

import pytest

from kvq_core.mla import MLA_MODES
from kvq_torch import _triton
from tests import backends, mla_cases
from tests.cases import MIXED
from tests.compare import Attention, assert_no_worse_than_naive
from tests.compiling import without_launchers
from tests.naive import naive_attention

pytestmark = pytest.mark.gpu

TORCH_GPU = backends.ON_GPU[0]
SEQS = tuple((1, length) for length in (500, 63, 0, 65, 129, 300))
KINDS = {
    "ordinary": {},
    "maxima-raised-often": {"k_exponents": MIXED, "v_exponents": MIXED, "sm_scale": 1.0},
    "nan": {"damage": ("nan_k",)},
    "foreign": {"damage": ("foreign",)},
}


@pytest.mark.parametrize("num_programs", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_heads", [9, 20, 33])  # in 16, 32 and 64 rows or columns
@pytest.mark.parametrize("mode", MLA_MODES)
def test_many_tiles_of_one_program_are_no_worse_than_naive(mode, num_heads, kind, num_programs):
    layout = mla_cases.layout_of(mode, 64, 512, 64)
    case = mla_cases.attention(f"many-tiles-{mode}-{kind}", layout, num_heads, seqs=SEQS, **KINDS[kind])
    facts = functools.partial(_with_programs, _triton.device_facts, num_programs)
    with mock.patch.object(_triton, "device_facts", facts), without_launchers():
        got = TORCH_GPU.attention(case.layout, case.inputs(), case.options())
    assert_no_worse_than_naive(got, *_expected(case))


def _with_programs(device_facts, num_programs, device):
    return dataclasses.replace(device_facts(device), num_sms=num_programs)


@functools.cache
def _expected(case):
    inputs = case.inputs()
    exact = backends.NUMPY.attention(case.layout, inputs, case.options())
    return exact, Attention(*naive_attention(case, inputs))
