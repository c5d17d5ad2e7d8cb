"""The numpy reference against bytes and sums worked out by hand."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from kvq_core import CacheLayout, KVQuantMode
from kvq_core.reference import append_kv, copy_pages, gather_kv, paged_attention, record_field

DIM = 16
# Values are kept as they are, so that sums can be done by hand.
EXACT = CacheLayout("float32", page_size=2, num_kv_heads=1, head_dim=DIM)
INT8 = CacheLayout("int8_per_token_head", page_size=2, num_kv_heads=2, head_dim=DIM)
MODE_PAIRS = [mode.value for mode in KVQuantMode] + ["int8_per_token_head/fp8_per_token_head", "fp8_e5m2/bfloat16"]


def poisoned_pool(layout, num_pages, padding=0):
    """Pages of 0xFF bytes, ``padding`` bytes apart, and the buffer they lie in."""
    page_stride = layout.page_bytes + padding
    buffer = np.full(num_pages * page_stride, 0xFF, np.uint8)
    pages = np.lib.stride_tricks.as_strided(buffer, layout.shape(num_pages), (page_stride, layout.record_bytes, 1))
    return pages, buffer


def int32(*values):
    return np.array(values, np.int32)


def slots_of(page_table_row, seq_len, page_size):
    tokens = np.arange(seq_len)
    return page_table_row[tokens // page_size].astype(np.int64) * page_size + tokens % page_size


def uniform_cache(values, page_table_row, num_pages=4):
    """Keys of zero, so that visible tokens share the weight, and rows of ``values`` for V."""
    pages, _ = poisoned_pool(EXACT, num_pages)
    v = np.repeat(np.float32(values), DIM).reshape(-1, 1, DIM)
    append_kv(EXACT, pages, np.zeros_like(v), v, slots_of(page_table_row, len(v), EXACT.page_size))
    return pages


def attend_uniform(values, table=(3, 1, 2), num_queries=1, **options):
    """First element of each query's result, and its lse, over the cache of `uniform_cache` read through ``table``."""
    pages = uniform_cache(values, int32(3, 1, 2))
    out, lse = paged_attention(
        EXACT,
        np.ones((num_queries, 1, DIM), np.float32),
        pages,
        int32(*table)[None],
        int32(len(values)),
        cu_seqlens_q=int32(0, num_queries),
        **options,
    )
    np.testing.assert_array_equal(out, np.broadcast_to(out[..., :1], out.shape))
    return out[:, 0, 0].tolist(), lse[:, 0].tolist()


class TestAppend:
    def test_codes_and_scales_lie_where_the_format_says_and_nothing_else_changes(self):
        pages, buffer = poisoned_pool(INT8, 3)
        k = np.zeros((1, 2, DIM), np.float32)
        k[0, :, 0] = 127.0, -254.0
        append_kv(INT8, pages, k, k / 2, np.array([3]))
        # Slot 3 is page 1, offset 1. A record of 96 bytes: K at 0, V at 32, K scales at 64, V scales at 80.
        expected = np.full_like(buffer, 0xFF)
        for head, code, k_scale in ((0, 127, 1.0), (1, 129, 2.0)):
            record = 1 * 192 + head * 96
            expected[record + 16 : record + 32] = [code] + [0] * 15
            expected[record + 48 : record + 64] = [code] + [0] * 15
            expected[record + 68 : record + 72] = np.frombuffer(np.float32(k_scale).tobytes(), np.uint8)
            expected[record + 84 : record + 88] = np.frombuffer(np.float32(k_scale / 2).tobytes(), np.uint8)
        np.testing.assert_array_equal(buffer, expected)

    def test_a_row_container_holds_codes_and_scales_side_by_side(self):
        layout = CacheLayout(
            "int8_per_token_head", page_size=2, num_kv_heads=2, head_dim=DIM, scale_placement="row", row_order="NHD"
        )
        pages = np.full(layout.shape(3), 0xFF, np.uint8)
        k = np.zeros((1, 2, DIM), np.float32)
        k[0, :, 0] = 127.0, -254.0
        append_kv(layout, pages, k, k / 2, np.array([3]))
        # Slot 3 is page 1, offset 1. A row of 40 bytes: K at 0, its scale at 16, V at 20, its scale at 36.
        expected = np.full_like(pages, 0xFF)
        for head, code, k_scale in ((0, 127, 1.0), (1, 129, 2.0)):
            sides = [[code] + [0] * 15 + list(np.float32(scale).tobytes()) for scale in (k_scale, k_scale / 2)]
            expected[1, 1, head] = np.array(sides, np.uint8).reshape(-1)
        np.testing.assert_array_equal(pages, expected)

    @pytest.mark.parametrize("kv_cache_dtype", MODE_PAIRS)
    def test_padding_between_pages_is_left_alone(self, kv_cache_dtype):
        layout = CacheLayout(kv_cache_dtype, page_size=3, num_kv_heads=2, head_dim=32, head_dim_v=16)
        k, v = random_rows(7, 2, 32), random_rows(7, 2, 16)
        dense, _ = poisoned_pool(layout, 3)
        padded, buffer = poisoned_pool(layout, 3, padding=48)
        for pages in (dense, padded):
            append_kv(layout, pages, k, v, np.arange(7), 0.5, 2.0)
        np.testing.assert_array_equal(padded, dense)
        assert (buffer.reshape(3, -1)[:, layout.page_bytes :] == 0xFF).all()

    def test_slots_outside_the_pool_are_dropped(self):
        pages, buffer = poisoned_pool(INT8, 2)
        kv = random_rows(4, 2, DIM)
        append_kv(INT8, pages, kv, kv, np.array([-1, 4, -(2**40), 2**40]))
        assert (buffer == 0xFF).all()
        append_kv(INT8, pages, kv, kv, np.array([-1, 3, 4, 2**40]))
        k, _ = gather_kv(INT8, pages, int32(1)[None], int32(2))
        np.testing.assert_allclose(k[0, 1], kv[1], atol=0.02)

    def test_of_tokens_with_one_slot_one_wins_whole(self):
        kv = random_rows(50, 2, DIM)
        pages, _ = poisoned_pool(INT8, 1)
        append_kv(INT8, pages, kv, -kv, np.zeros(50, np.int32))
        winners = []
        for token in range(50):
            alone, _ = poisoned_pool(INT8, 1)
            append_kv(INT8, alone, kv[token, None], -kv[token, None], int32(0))
            winners.append(np.array_equal(alone, pages))
        assert sum(winners) == 1

    def test_a_shard_holds_the_bytes_of_its_heads(self):
        kv = random_rows(4, 2, DIM)
        whole, _ = poisoned_pool(INT8, 2)
        shard, _ = poisoned_pool(INT8.shard(2), 2)
        append_kv(INT8, whole, kv, kv, np.arange(4))
        append_kv(INT8, shard, kv[:, 1:], kv[:, 1:], np.arange(4))  # global layout, local pages, as in shard_map
        np.testing.assert_array_equal(shard, whole[:, 1:])

    def test_refused_call_writes_nothing(self):
        pages, buffer = poisoned_pool(INT8, 2)
        kv = random_rows(2, 2, DIM)
        with pytest.raises(ValueError, match=r"num_tokens=2.*got \[3\]"):
            append_kv(INT8, pages, kv, kv, np.arange(3))
        assert (buffer == 0xFF).all()


class TestGather:
    @pytest.mark.parametrize("kv_cache_dtype", MODE_PAIRS)
    def test_values_come_back_and_are_zero_past_each_length(self, kv_cache_dtype):
        layout = CacheLayout(kv_cache_dtype, page_size=3, num_kv_heads=2, head_dim=32, head_dim_v=16)
        pages, _ = poisoned_pool(layout, 5, padding=16)
        table = np.array([[4, 0, 2], [1, -1, 99]], np.int32)
        k, v = random_rows(9, 2, 32), random_rows(9, 2, 16)
        slots = np.concatenate([slots_of(table[0], 7, 3), slots_of(table[1], 2, 3)])
        append_kv(layout, pages, k, v, slots, 0.5, 0.25)
        got_k, got_v = gather_kv(layout, pages, table, int32(7, 2), 0.5, 0.25)
        assert (got_k.shape, got_k.dtype) == ((2, 9, 2, 32), np.float32)
        assert (got_v.shape, got_v.dtype) == ((2, 9, 2, 16), np.float32)
        for got, given in ((got_k, k), (got_v, v)):
            np.testing.assert_allclose(got[0, :7], given[:7], rtol=0.13, atol=0.02)
            np.testing.assert_allclose(got[1, :2], given[7:], rtol=0.13, atol=0.02)
            assert not got[0, 7:].any()
            assert not got[1, 2:].any()

    def test_page_outside_the_pool_is_nan_up_to_the_length(self):
        pages = uniform_cache([1, 2, 3, 4, 5], int32(0, 1, 2))
        k, v = gather_kv(EXACT, pages, np.array([[0, 4, 2], [-1, 1, 2]], np.int32), int32(5, 1))
        nan = math.nan
        np.testing.assert_array_equal(v[..., 0, 0], [[1, 2, nan, nan, 5, 0], [nan, 0, 0, 0, 0, 0]])
        np.testing.assert_array_equal(k[..., 0, 0], [[0, 0, nan, nan, 0, 0], [nan, 0, 0, 0, 0, 0]])

    def test_length_past_the_table_reads_the_table_and_a_negative_one_nothing(self):
        pages = uniform_cache([1, 2, 3], int32(0, 1))
        _, v = gather_kv(EXACT, pages, int32(1, 0).reshape(2, 1), int32(2**31 - 1, -3))
        assert v[0, 0, 0, 0] == 3
        assert not v[1].any()

    def test_stored_nan_scale_reads_back_as_nan(self):
        pages, _ = poisoned_pool(INT8, 1)
        kv = random_rows(2, 2, DIM)
        kv[0, 1, 3] = np.inf
        append_kv(INT8, pages, kv, kv, np.arange(2))
        k, _ = gather_kv(INT8, pages, int32(0)[None], int32(2))
        assert np.isnan(k[0, 0, 1]).all()
        assert np.isfinite(k[0, 1]).all()
        assert np.isfinite(k[0, 0, 0]).all()

    def test_no_sequences(self):
        pages, _ = poisoned_pool(INT8, 1)
        k, v = gather_kv(INT8, pages, np.zeros((0, 3), np.int32), int32())
        assert k.shape == v.shape == (0, 6, 2, DIM)


class TestCopyPages:
    def test_sources_are_read_before_any_write_and_other_pages_stay(self):
        pages, _ = poisoned_pool(INT8, 4, padding=16)
        pages[...] = np.arange(4, dtype=np.uint8)[:, None, None]
        copy_pages(pages, int32(0, 1), np.array([1, 2]))
        assert pages[:, 0, 0].tolist() == [0, 0, 1, 3]
        assert (pages == pages[:, :1, :1]).all()

    def test_pairs_outside_the_pool_are_skipped(self):
        pages, _ = poisoned_pool(INT8, 4)
        pages[...] = np.arange(4, dtype=np.uint8)[:, None, None]
        copy_pages(pages, int32(-1, 0, 4, 0, 1), int32(0, -1, 3, 4, 2))
        assert pages[:, 0, 0].tolist() == [0, 1, 1, 3]


class TestAttentionByHand:
    """Keys are zero: the result is the mean of the visible values, lse the logarithm of their number."""

    def test_one_query_sees_everything(self):
        assert attend_uniform([1, 2, 3, 4, 10]) == ([4.0], [math.log(5)])

    def test_queries_are_the_last_positions_and_causal(self):
        assert attend_uniform([3, 5, 1], num_queries=3) == ([3.0, 4.0, 3.0], [0.0, math.log(2), math.log(3)])

    def test_not_causal_queries_see_the_future(self):
        out, _ = attend_uniform([3, 5, 1], num_queries=2, causal=False)
        assert out == [3.0, 3.0]

    def test_window_counts_the_own_position(self):
        assert attend_uniform([1, 2, 4, 8], num_queries=2, window=2) == ([3.0, 6.0], [math.log(2)] * 2)
        assert attend_uniform([1, 2, 4, 8], num_queries=2, window=1) == ([4.0, 8.0], [0.0] * 2)

    def test_window_is_one_sided_when_not_causal(self):
        out, _ = attend_uniform([1, 2, 4, 8], num_queries=3, window=2, causal=False)
        np.testing.assert_allclose(out, [15 / 4, 14 / 3, 6])

    def test_query_before_the_first_key_sees_nothing(self):
        assert attend_uniform([6, 2], num_queries=3) == ([0.0, 6.0, 4.0], [-math.inf, 0.0, math.log(2)])

    def test_sink_joins_the_denominator_only(self):
        out, lse = attend_uniform([6, 2], num_queries=3, sinks=np.float32([0.0]))
        np.testing.assert_allclose(out, [0, 3, 8 / 3])
        np.testing.assert_allclose(lse, [0, math.log(2), math.log(3)])

    def test_alibi_weighs_by_distance(self):
        out, lse = attend_uniform([8, 4, 2], alibi_slopes=np.float32([math.log(2)]))
        np.testing.assert_allclose(out, [(8 / 4 + 4 / 2 + 2) / 1.75], rtol=1e-6)
        np.testing.assert_allclose(lse, [math.log(1.75)], rtol=1e-6)

    def test_scale_then_softcap_shape_the_score(self):
        pages, _ = poisoned_pool(EXACT, 1)
        k = np.zeros((1, 1, DIM), np.float32)
        k[..., 0] = 24.0
        append_kv(EXACT, pages, k, k, int32(0))
        q = np.full((1, 1, DIM), 0.5, np.float32)

        def lse(**options):
            return paged_attention(EXACT, q, pages, int32(0)[None], int32(1), **options)[1].item()

        assert lse() == 24 * 0.5 * 0.25
        assert lse(sm_scale=2.0) == 24.0
        assert lse(sm_scale=2.0, softcap=8.0) == 8 * math.tanh(3)

    def test_rows_past_the_last_sequence_are_padding(self):
        pages = uniform_cache([5, 7], int32(0, 1))
        out, lse = paged_attention(
            EXACT,
            np.ones((4, 1, DIM), np.float32),
            pages,
            int32(0, 0).reshape(2, 1),
            int32(2, 0),
            cu_seqlens_q=int32(0, 1, 1),
            sinks=np.float32([0.0]),
        )
        np.testing.assert_allclose(out[:, 0, 0], [4, 0, 0, 0])
        np.testing.assert_allclose(lse[:, 0], [math.log(3), *[-math.inf] * 3])

    def test_empty_calls_have_the_right_shapes(self):
        pages, _ = poisoned_pool(INT8, 1)
        no_table, no_queries = np.zeros((0, 2), np.int32), np.zeros((0, 4, DIM), np.float16)
        for num_seqs in (0, 2):
            table, cu_seqlens_q = np.zeros((num_seqs, 2), np.int32), np.zeros(num_seqs + 1, np.int32)
            lens = np.ones(num_seqs, np.int32)
            out, lse = paged_attention(INT8, no_queries, pages, table, lens, cu_seqlens_q=cu_seqlens_q)
            assert (out.shape, lse.shape) == ((0, 4, DIM), (0, 4))
        out, lse = paged_attention(INT8, no_queries, pages, no_table, int32())
        assert (out.dtype, lse.dtype) == (np.float64, np.float64)


class TestAttentionNan:
    def test_page_outside_the_pool_spoils_only_the_queries_that_see_it(self):
        for page in (-1, 4, 2**31 - 1):
            out, lse = attend_uniform([1, 2, 3, 4, 5, 6], (3, 1, page), num_queries=3)
            np.testing.assert_array_equal(out, [2.5, math.nan, math.nan])
            np.testing.assert_array_equal(lse, [math.log(4), math.nan, math.nan])

    def test_page_before_every_window_is_never_examined(self):
        out, _ = attend_uniform([1, 2, 3, 4, 5, 6], (-1, 1, 2), num_queries=2, window=2)
        assert out == [4.5, 5.5]

    def test_entries_past_the_length_are_never_examined(self):
        out, _ = attend_uniform([1, 2, 3], (3, 1, -1))
        assert out == [2.0]

    @pytest.mark.parametrize("seq_len", [3, 2**31 - 1])
    def test_length_past_the_table_is_nan_for_the_queries_that_see_past_it(self, seq_len):
        pages = uniform_cache([1, 2], int32(3, 1))
        q = np.ones((2, 1, DIM), np.float32)
        arguments = (EXACT, q, pages, int32(3)[None], int32(seq_len))
        out, lse = paged_attention(*arguments, cu_seqlens_q=int32(0, 2))
        last_of_the_table = [1.5] if seq_len == 3 else [math.nan]
        np.testing.assert_array_equal(out[:, 0, 0], [*last_of_the_table, math.nan])
        np.testing.assert_array_equal(np.isnan(lse), np.isnan(out[..., 0]))

    def test_stale_slots_past_the_length_do_not_leak(self):
        pages = uniform_cache([1, 2, 3], int32(3, 1))
        assert np.isnan(record_field(EXACT, pages, "v_codes")[1, 0, 1]).all()
        assert attend_uniform([1, 2, 3], causal=False)[0] == [2.0]

    @pytest.mark.parametrize("stored", [math.nan, math.inf, -math.inf])
    def test_value_that_is_not_finite_reaches_only_the_queries_and_elements_that_read_it(self, stored):
        pages = uniform_cache([1, 2, 3], int32(0, 1))
        record_field(EXACT, pages, "v_codes")[1, 0, 0, 5] = stored  # token 2
        out, lse = paged_attention(
            EXACT,
            np.ones((2, 1, DIM), np.float32),
            pages,
            int32(0, 1)[None],
            int32(3),
            cu_seqlens_q=int32(0, 2),
        )
        expected = np.array([[1.5] * DIM, [2.0] * DIM])
        expected[1, 5] = stored
        np.testing.assert_array_equal(out[:, 0], expected)
        np.testing.assert_allclose(lse[:, 0], [math.log(2), math.log(3)])

    def test_nan_key_spoils_the_queries_of_its_kv_head_that_see_it(self):
        pages, _ = poisoned_pool(INT8, 2)
        kv = random_rows(3, 2, DIM)
        append_kv(
            INT8,
            pages,
            np.where(np.arange(3)[:, None, None] == 2, [[math.nan], [1.0]], kv).astype(np.float32),
            kv,
            np.arange(3),
        )
        out, lse = paged_attention(
            INT8, random_rows(2, 4, DIM), pages, int32(0, 1)[None], int32(3), cu_seqlens_q=int32(0, 2)
        )
        np.testing.assert_array_equal(np.isnan(lse), [[False] * 4, [True, True, False, False]])
        np.testing.assert_array_equal(np.isnan(out), np.isnan(lse)[..., None].repeat(DIM, -1))


@pytest.mark.parametrize("kv_cache_dtype", MODE_PAIRS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": False, "sm_scale": 0.3},
        {"window": 3, "softcap": 2.0, "sinks": np.float32(range(6)), "alibi_slopes": np.float32(range(6)) / 4},
        {"window": 4, "causal": False, "max_seqlen_q": 5},
    ],
)
def test_attention_agrees_with_a_scalar_loop_over_the_gathered_values(kv_cache_dtype, options):
    layout = CacheLayout(kv_cache_dtype, page_size=3, num_kv_heads=2, head_dim=32, head_dim_v=16)
    pages, _ = poisoned_pool(layout, 6, padding=16)
    table = np.array([[4, 0, 2], [1, 5, -1]], np.int32)
    seq_lens, cu_seqlens_q = int32(8, 4), int32(0, 5, 6)
    slots = np.concatenate([slots_of(row, n, 3) for row, n in zip(table, seq_lens, strict=True)])
    scales = (0.5, 0.25)
    append_kv(layout, pages, random_rows(12, 2, 32), random_rows(12, 2, 16).astype(np.float16), slots, *scales)
    q = random_rows(6, 6, 32).astype(ml_dtypes.bfloat16)
    out, lse = paged_attention(
        layout,
        q,
        pages,
        table,
        seq_lens,
        cu_seqlens_q=cu_seqlens_q,
        k_scale=scales[0],
        v_scale=scales[1],
        **options,
    )
    k, v = gather_kv(layout, pages, table, seq_lens, *scales)
    for seq in range(2):
        for row in range(cu_seqlens_q[seq], cu_seqlens_q[seq + 1]):
            position = int(seq_lens[seq] - cu_seqlens_q[seq + 1] + row)
            for head in range(6):
                keys, values = k[seq, : seq_lens[seq], head // 3], v[seq, : seq_lens[seq], head // 3]
                expected, expected_lse = scalar_attention(q[row, head], keys, values, position, head, **options)
                np.testing.assert_allclose(out[row, head], expected, rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(lse[row, head], expected_lse, rtol=1e-12)


def scalar_attention(
    q, k, v, position, head, causal=True, window=None, sm_scale=None, softcap=None, sinks=None, alibi_slopes=None, **_
):
    """One query and head, one number at a time."""
    sm_scale = len(q) ** -0.5 if sm_scale is None else sm_scale
    weights, sums = [], [0.0] * v.shape[1]
    for j in range(len(k)):
        if (causal and j > position) or (window is not None and j <= position - window):
            continue
        score = sm_scale * math.fsum(float(a) * float(b) for a, b in zip(q, k[j], strict=True))
        if softcap is not None:
            score = softcap * math.tanh(score / softcap)
        if alibi_slopes is not None:
            score += float(alibi_slopes[head]) * (j - position)
        weights.append(math.exp(score))
        sums = [total + weights[-1] * float(value) for total, value in zip(sums, v[j], strict=True)]
    denominator = math.fsum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
    return [total / denominator for total in sums], math.log(denominator)


def random_rows(num_tokens, num_heads, dim):
    return np.random.default_rng(num_tokens * dim).normal(size=(num_tokens, num_heads, dim)).astype(np.float32)
