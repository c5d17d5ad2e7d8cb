"""The opt-in checks of values: what passes, and that a refusal names the first offending index and value."""

from __future__ import annotations

import re

import numpy as np
import pytest

from kvq_core import checks

NO_TABLE = np.zeros((0, 4), np.int32)


@pytest.mark.parametrize(
    ("check", "arguments"),
    [
        (checks.check_slot_mapping, ([0, 31, -1, 7, -1], 2, 16)),
        (checks.check_slot_mapping, ([], 0, 16)),
        (checks.check_page_table, ([[1, 0], [0, -7]], [17, 16], 2, 16)),
        (checks.check_page_table, ([[99]], [0], 2, 16)),
        (checks.check_page_table, (NO_TABLE, [], 2, 16)),
        (checks.check_page_ids, ([0, 1, 1], 2)),
        (checks.check_page_ids, ([], 0)),
        (checks.check_cu_seqlens_q, ([0, 2, 2, 5], 7)),
        (checks.check_cu_seqlens_q, ([0, 2, 2, 5], 5, 3)),
        (checks.check_cu_seqlens_q, ([0], 0)),
        (checks.check_scales, (1.0,)),
        (checks.check_scales, (np.float32([1e-6, 3e38]),)),
    ],
)
def test_good_values_pass(check, arguments):
    check(*arguments)


@pytest.mark.parametrize(
    ("check", "arguments", "expected", "got"),
    [
        (checks.check_slot_mapping, ([0, -5, 32, 33], 2, 16), "slot_mapping[2] to be below", "32"),
        (checks.check_slot_mapping, ([4, -1, 9, -1, 9, 4], 2, 16), "slot_mapping[4] to be not the slot of an", "9"),
        (checks.check_page_table, ([[0, 1], [0, -7]], [16, 17], 2, 16), "page_table[1, 1] to be a page id", "-7"),
        (checks.check_page_table, ([[0, 1], [2, 0]], [16, 17], 2, 16), "page_table[1, 0] to be a page id", "2"),
        (checks.check_page_table, ([[0], [0]], [16, 17], 2, 16), "seq_lens[1] to be at most max_pages", "17"),
        (checks.check_page_table, ([[0]], [-1], 2, 16), "seq_lens[0] to be 0 or more", "-1"),
        (checks.check_page_ids, ([1, -1], 2), "page_ids[1] to be a page id from 0 to 1", "-1"),
        (checks.check_page_ids, ([2], 2), "page_ids[0] to be a page id from 0 to 1", "2"),
        (checks.check_cu_seqlens_q, ([1, 2], 5), "cu_seqlens_q[0] to be 0 first", "1"),
        (checks.check_cu_seqlens_q, ([0, 3, 2], 5), "cu_seqlens_q[2] to be no less than", "2"),
        (checks.check_cu_seqlens_q, ([0, 3, 6], 5), "cu_seqlens_q[2] to be at most num_q_tokens = 5", "6"),
        (checks.check_cu_seqlens_q, ([0, 1, 4], 5, 2), "cu_seqlens_q[2] to be at most max_seqlen_q = 2", "4"),
        (checks.check_scales, (0.0,), "scales to be finite", "0.0"),
        (checks.check_scales, ([1.0, -1.0],), "scales[1] to be finite", "-1.0"),
        (checks.check_scales, ([1.0, np.nan],), "scales[1] to be finite", "nan"),
        (checks.check_scales, (np.inf,), "scales to be finite", "inf"),
        (checks.check_scales, (1e-40,), "scales to be finite", "9.9999"),
    ],
)
def test_first_bad_value_is_named(check, arguments, expected, got):
    with pytest.raises(ValueError, match=re.escape(f"expected {expected}") + f".*; got {re.escape(got)}"):
        check(*arguments)
