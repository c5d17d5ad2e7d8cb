"""What fits into a memory: literals computed by hand, and properties against a simulation."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvq_core.planner import MemoryPlan, decode_bytes, num_pages, parse_bytes, sequence_bytes
from kvq_core.policy import layer_policies
from tests.model_configs import CONFIGS

GIB = 2**30


def plan(name, kv_cache_dtype, *, context, memory=80 * GIB, **options):
    return MemoryPlan(layer_policies(CONFIGS[name], kv_cache_dtype, **options), context=context, memory=memory)


def test_full_attention_grows_with_the_context():
    # 131072 bytes a token, 2 GiB a sequence of 16384.
    planned = plan("Llama-3.1-8B", "bfloat16", context=16384, memory=9 * GIB)
    assert planned.bytes_per_token == 131072
    assert planned.bytes_per_sequence == 2 * GIB
    assert planned.num_sequences == 4
    assert planned.tokens == 4 * 16384 + 8192
    assert planned.num_pages == ((4 * 16384 + 8192) // 16,) * 32
    assert planned.decode_bytes == 2 * GIB


def test_int8_holds_nearly_twice_the_tokens():
    # A page of 16 tokens of all layers: 32 x 8 x 4224 = 1081344 bytes; 80 GiB / 1081344 = 79437.6.
    planned = plan("Llama-3.1-8B", "int8_per_token_head", context=131072)
    assert planned.bytes_per_token == 67584
    assert planned.tokens == 79437 * 16
    assert plan("Llama-3.1-8B", "bfloat16", context=131072).tokens == 655360


def test_sliding_layers_hold_a_window_and_not_the_context():
    # gpt-oss-20b: 12 full layers of 8192 pages, 12 windows of 128 tokens: 8 pages and one more. 32768 bytes a page.
    planned = plan("gpt-oss-20b", "bfloat16", context=131072)
    assert [num_pages(layer, 131072) for layer in planned.layers] == [9, 8192] * 12
    assert planned.bytes_per_sequence == 12 * (9 + 8192) * 32768
    assert planned.num_sequences == 26
    assert planned.bytes_per_token == 24 * 2048
    assert planned.decode_bytes == 12 * (128 + 131072) * 2048


def test_a_hybrid_of_modes_counts_each_layer_in_its_own():
    planned = plan("gpt-oss-20b", "int8_per_token_head", context=131072, skip_layers="sliding_window")
    assert planned.bytes_per_sequence == 12 * 9 * 32768 + 12 * 8192 * 17408
    assert planned.decode_bytes == 12 * 128 * 2048 + 12 * 131072 * 1088


def test_shared_pages_are_stored_once_and_read_by_every_layer():
    # gemma-4-E2B: layers 15 to 34 read the pages of 13 (sliding, 1 x 256) and 14 (full, 1 x 512).
    planned = plan("gemma-4-E2B-it", "bfloat16", context=32768)
    assert [num_pages(layer, 32768) for layer in planned.layers] == ([33] * 4 + [2048]) * 3 + [0] * 20
    assert planned.num_pages[15:] == (0,) * 20
    assert planned.bytes_per_sequence == 12 * 33 * 16384 + 3 * 2048 * 32768
    assert planned.decode_bytes == 28 * 512 * 1024 + 7 * 32768 * 2048


def test_recurrent_layers_hold_no_pages():
    planned = plan("Qwen3-Next-80B-A3B", "bfloat16", context=4096)
    assert planned.bytes_per_sequence == 12 * 4096 * 2048
    assert planned.num_pages[:3] == (0, 0, 0)


def test_latents_are_small():
    # 61 layers x (512 + 64) x 2 bytes; int8 latents, a scale and a bfloat16 rope part: 512 + 4 + 128.
    assert plan("DeepSeek-V3", "bfloat16", context=4096).bytes_per_sequence == 4096 * 70272
    assert plan("DeepSeek-V3", "int8_per_token_head", context=4096).bytes_per_sequence == 4096 * 39284


def test_a_model_of_windows_alone_forgets():
    # Mistral-7B-v0.1, window 4096: 257 pages whatever the context.
    assert plan("Mistral-7B-v0.1", "bfloat16", context=32768).bytes_per_sequence == 32 * 257 * 65536
    assert plan("Mistral-7B-v0.1", "bfloat16", context=4096).bytes_per_sequence == 32 * 256 * 65536


def test_a_context_of_part_of_a_page_takes_the_page():
    assert plan("Llama-3.1-8B", "bfloat16", context=17).bytes_per_sequence == 32 * 2 * 65536
    assert plan("Llama-3.1-8B", "bfloat16", context=17, memory=32 * 2 * 65536).tokens == 17
    assert plan("Llama-3.1-8B", "bfloat16", context=17, memory=32 * 2 * 65536 - 1).tokens == 16


def test_nothing_fits_into_nothing():
    planned = plan("Llama-3.1-8B", "bfloat16", context=1024, memory=0)
    assert (planned.tokens, planned.num_sequences, set(planned.num_pages)) == (0, 0, {0})


@given(window=st.integers(1, 70), page_size=st.integers(1, 20), length=st.integers(1, 200))
def test_a_window_holds_the_most_pages_that_it_touches_on_its_way(window, page_size, length):
    layer = layer_policies(
        {"num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 16, "sliding_window": window},
        "bfloat16",
        page_size=page_size,
    )[0]
    touched = [last // page_size - max(0, last - window + 1) // page_size + 1 for last in range(length)]
    assert num_pages(layer, length) >= max(touched)
    if length >= window + page_size:  # every position of the window in a page has occurred
        assert num_pages(layer, length) == max(touched)


@given(
    name=st.sampled_from(["Llama-3.1-8B", "gpt-oss-20b", "gemma-4-E2B-it", "Qwen3-Next-80B-A3B", "DeepSeek-V3"]),
    mode=st.sampled_from(["bfloat16", "int8_per_token_head", "fp8"]),
    context=st.integers(1, 40000),
    memory=st.integers(0, 10**11),
    page_size=st.integers(1, 128),
)
def test_what_is_said_to_fit_fits_and_one_token_more_does_not(name, mode, context, memory, page_size):
    planned = plan(name, mode, context=context, memory=memory, page_size=page_size)
    pools = zip(planned.num_pages, [layer.layout for layer in planned.layers], strict=True)
    assert sum(pages * layout.page_bytes for pages, layout in pools if layout is not None) <= memory
    rest = planned.tokens - planned.num_sequences * context
    assert 0 <= rest < context
    assert planned.num_sequences * planned.bytes_per_sequence + sequence_bytes(planned.layers, rest + 1) > memory
    assert dataclasses.replace(planned, memory=memory + 10**8).tokens >= planned.tokens


def test_layers_can_be_counted_alone():
    layers = layer_policies(CONFIGS["gpt-oss-20b"], "bfloat16")
    assert sequence_bytes(layers[:1], 4096) == 9 * 32768
    assert decode_bytes(layers[:1], 4096) == 128 * 2048
    assert decode_bytes(layers[1:2], 100) == 100 * 2048


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 0}, "expected context to be an integer from 1; got 0"),
        ({"context": 1024, "memory": -1}, "expected memory .*got -1"),
    ],
)
def test_a_malformed_plan_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan("Llama-3.1-8B", "bfloat16", **options)


def test_a_model_without_kv_cache_is_refused():
    layers = layer_policies({"layer_types": ["linear_attention"] * 2}, "bfloat16")
    with pytest.raises(ValueError, match="this one has none"):
        MemoryPlan(layers, context=1024, memory=GIB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0", 0),
        ("4096", 4096),
        ("7 B", 7),
        ("141GB", 141_000_000_000),
        ("141 GB", 141_000_000_000),
        ("141gb", 141_000_000_000),
        ("141GiB", 151_397_597_184),
        ("1.5KiB", 1536),
        ("0.5TB", 500_000_000_000),
        ("3MB", 3_000_000),
        ("2MiB", 2_097_152),
        ("1TiB", 1_099_511_627_776),
    ],
)
def test_sizes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "141G", "141 Gbit", "-1GB", "1e9", "141iB", "1,5GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=r"'141GB' \(10\*\*9\)"):
        parse_bytes(text)
