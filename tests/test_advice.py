"""Advice appears where its reason holds, and nowhere else; its figures are those of its sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvq_core.advice import _RESULTS, DECODE_US, Situation, advise
from kvq_core.planner import MemoryPlan
from kvq_core.policy import layer_policies
from tests.model_configs import CONFIGS

ROOT = Path(__file__).parents[1]


def advice(name, kv_cache_dtype, *, context=131072, memory=10**11, skip_layers=(), quantization_config=None):
    config = {**CONFIGS[name], "quantization_config": quantization_config}

    def plan(mode, skip_layers=()):
        return MemoryPlan(layer_policies(config, mode, skip_layers=skip_layers), context=context, memory=memory)

    by_mode = {mode: plan(mode) for mode in ("bfloat16", "int8_per_token_head")}
    return advise(Situation(plan(kv_cache_dtype, skip_layers), by_mode, config, skip_layers))


def about(beginning, sentences):
    """The one sentence with this beginning, or nothing."""
    found = [sentence for sentence in sentences if sentence.startswith(beginning)]
    assert len(found) <= 1
    return found[0] if found else ""


def test_figures_of_kvq_are_those_of_the_committed_run():
    rows = json.loads((ROOT / _RESULTS).read_text())["rows"]
    us = {(row["case"], row["mode"]): row["timing"][0] for row in rows if row["impl"] == "kvq torch"}
    for case, modes in DECODE_US.items():
        assert modes == {mode: round(us[case, mode], 1) for mode in modes}


def test_what_quantizing_gains_is_told_in_figures():
    assert (
        "takes 51.6% of bfloat16's memory, and a decode step reads 51.6%"
        in advice("Llama-3.1-8B", "int8_per_token_head")[0]
    )
    said = about("Nothing is quantized.", advice("Llama-3.1-8B", "bfloat16"))
    assert "would store 51.6% of the bytes of a sequence" in said
    assert f"in {DECODE_US['64x8k']['int8_per_token_head']:.0f} us from int8" in said


def test_small_windows_are_to_be_skipped():
    # 12 windows of 9 pages beside 12 layers of 8192; 12 x 128 tokens read beside 12 x 131072.
    said = about("Skip the 12 sliding-window layers (--skip-layers sliding_window)", advice("gpt-oss-20b", "fp8"))
    assert "hold 0.1% of a sequence's bytes and read 0.1% of a decode step's" in said
    assert "from 80% to 71%" in said


def test_larger_windows_are_to_be_weighed():
    said = about("Consider --skip-layers sliding_window for the 29 sliding-window", advice("gemma-3-4b-it", "fp8"))
    # 29 x 65 pages of 34 layers x 8192 pages; 29 x 1024 tokens of 5 x 131072.
    assert "hold 4.4% of a sequence's bytes and read 4.3% of a decode step's" in said


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("gpt-oss-20b", "fp8", {"skip_layers": "sliding_window"}),
        ("gpt-oss-20b", "bfloat16", {}),
        ("gpt-oss-20b", "fp8", {"context": 128}),  # the window holds all of it
        ("Mistral-7B-v0.1", "fp8", {}),  # nothing else to quantize
        ("Llama-4-Scout-17B-16E", "fp8", {}),  # chunks are not windows that slide
    ],
)
def test_windows_are_left_alone(name, mode, options):
    assert not any("sliding-window layer" in sentence for sentence in advice(name, mode, **options))


def test_a_word_that_skips_nothing_is_pointed_out():
    said = "--skip-layers sliding_window skips nothing"
    assert about(said, advice("Llama-3.1-8B", "fp8", skip_layers="sliding_window"))
    assert not about(said, advice("gpt-oss-20b", "fp8", skip_layers="sliding_window"))
    assert not about(said, advice("Llama-3.1-8B", "fp8"))


def test_scales_of_a_tensor_want_calibration():
    said = about("Calibrate k_scale and v_scale", advice("Llama-3.1-8B", "bfloat16/fp8"))
    assert "stores 67584 bytes per token in these layers where this stores 98304" in said
    skipping = about("Calibrate", advice("gpt-oss-20b", "fp8", skip_layers="sliding_window"))
    assert "stores 13056 bytes per token in these layers where this stores 12288" in skipping
    assert not about("Calibrate", advice("Llama-3.1-8B", "int8_per_token_head/fp8_per_token_head"))
    calibrated = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}
    assert not about("Calibrate", advice("Llama-3.1-8B", "fp8", quantization_config=calibrated))
    assert not about("Calibrate", advice("gemma-3-4b-it", "fp8", quantization_config=calibrated))
    assert about("Calibrate", advice("Llama-3.1-8B", "fp8", quantization_config={"quant_method": "awq"}))


@pytest.mark.parametrize(("context", "is_short"), [(1024, True), (7009, True), (7010, False), (131072, False)])
def test_short_contexts_gain_memory_and_not_speed(context, is_short):
    said = about(
        f"Expect memory and not speed from a context of {context}", advice("Llama-3.1-8B", "fp8", context=context)
    )
    assert bool(said) == is_short
    assert not about("Expect", advice("Llama-3.1-8B", "bfloat16", context=context))


def test_prefill_of_large_heads_is_to_be_measured():
    assert "heads of 512 elements" in about("Measure prefill", advice("gemma-4-31B-it", "int8_per_token_head"))
    # The layers that are quantized count: those of 512 are skipped here.
    skipped = advice("gemma-4-31B-it", "fp8", skip_layers=range(5, 60, 6))
    assert "heads of 256 elements" in about("Measure prefill", skipped)
    assert not about("Measure prefill", advice("gemma-4-31B-it", "bfloat16"))
    assert not about("Measure prefill", advice("Llama-3.1-8B", "fp8"))
    assert not about("Measure prefill", advice("DeepSeek-V3", "int8_per_token_head"))


def test_edges_need_no_guard_at_8_bits():
    assert about("first:2, last:2 is not needed", advice("Qwen2.5-7B-Instruct", "fp8", skip_layers="first:2,3,last:2"))
    assert not about("first:2", advice("Qwen2.5-7B-Instruct", "bfloat16", skip_layers="first:2"))


def test_recurrent_states_are_not_counted():
    assert about("Leave memory for the states of 36 recurrent layers", advice("Qwen3-Next-80B-A3B", "fp8"))
    assert not about("Leave memory", advice("Llama-3.1-8B", "fp8"))


def test_a_sequence_that_does_not_fit_is_told_first():
    said = advice("Llama-3.1-8B", "bfloat16", memory=10**10)[0]
    assert said.startswith("Not one sequence of 131072 tokens fits: it needs 17.18 GB and there are 10.00 GB.")
    assert not about("Not one", advice("Llama-3.1-8B", "bfloat16", memory=2 * 10**10))
