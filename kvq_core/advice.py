"""Advice on a memory plan: plain sentences, each with its reason and the source of its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kvq_core.mla import MLALayout
from kvq_core.model_config import SLIDING_KINDS, text_config
from kvq_core.planner import MemoryPlan, decode_bytes, sequence_bytes
from kvq_core.policy import LayerPolicy, SkipLayers, modes_of, skip_items

# "The State of FP8 KV-Cache and Attention Quantization in vLLM": H100, FlashAttention 3, fp8_e4m3 at scale 1.0.
_VLLM = "vLLM blog, 22 April 2026"
# Llama-3.1-8B: the decode step got faster than with bfloat16 from 7,010 tokens on.
VLLM_BREAK_EVEN = 7010
# gpt-oss-20b, the one model where vLLM skips; it quantizes the windows of 512 of Gemma 4.
VLLM_SKIPPED_WINDOW = 128
# bench/results/nvidia-h200.json, one H200: microseconds of one layer's decode, 32 query heads, 8 KV heads x 128.
_RESULTS = "bench/results/nvidia-h200.json"
DECODE_US = {
    "1x1k": {"int8_per_token_head": 8.1, "bfloat16": 8.0},
    "64x8k": {"int8_per_token_head": 267.9, "bfloat16": 493.8},
}


@dataclass(frozen=True)
class Situation:
    """What advice looks at.

    Attributes:
        plan: the plan of the request.
        by_mode: plans of the same model, memory and context by ``kv_cache_dtype``, nothing skipped;
            ``"bfloat16"`` and ``"int8_per_token_head"`` at least.
        config: the Hugging Face config.
        skip_layers: what was asked to be skipped.
    """

    plan: MemoryPlan
    by_mode: Mapping[str, MemoryPlan]
    config: Any
    skip_layers: SkipLayers = ()

    @property
    def layers(self) -> tuple[LayerPolicy, ...]:
        """All layers of the model."""
        return self.plan.layers

    @property
    def quantized(self) -> tuple[LayerPolicy, ...]:
        """The layers that store codes with scales."""
        return tuple(layer for layer in self.layers if layer.is_quantized)


def advise(situation: Situation) -> list[str]:
    """The advice that applies to ``situation``, the most consequential first."""
    return [sentence for rule in _RULES if (sentence := rule(situation))]


def _one_sequence_fits(situation: Situation) -> str | None:
    plan = situation.plan
    if plan.num_sequences:
        return None
    return (
        f"Not one sequence of {plan.context} tokens fits: it needs {plan.bytes_per_sequence / 1e9:.2f} GB and there "
        f"are {plan.memory / 1e9:.2f} GB. Shorten the context, give more memory or quantize more layers."
    )


def _what_quantizing_gains(situation: Situation) -> str:
    plan, bfloat16, us = situation.plan, situation.by_mode["bfloat16"], DECODE_US["64x8k"]
    measured = (
        f"one layer decoded 64 sequences of 8k keys in {us['int8_per_token_head']:.0f} us from int8 and in "
        f"{us['bfloat16']:.0f} from bfloat16 (8 KV heads x 128, H200, {_RESULTS})"
    )
    if not situation.quantized:
        int8 = situation.by_mode["int8_per_token_head"]
        return (
            "Nothing is quantized. int8_per_token_head would store "
            f"{int8.bytes_per_sequence / plan.bytes_per_sequence:.1%} of the bytes of a sequence; {measured}."
        )
    return (
        f"A sequence of {plan.context} tokens takes {plan.bytes_per_sequence / bfloat16.bytes_per_sequence:.1%} of "
        f"bfloat16's memory, and a decode step reads {plan.decode_bytes / bfloat16.decode_bytes:.1%} of its bytes. "
        f"Where reading them is what takes the time, time follows: {measured}."
    )


def _skip_sliding_windows(situation: Situation) -> str | None:
    plan = situation.plan
    sliding = _quantized_windows(situation)
    if not sliding or len(sliding) == len([layer for layer in situation.layers if layer.layout]):
        return None
    window = max(layer.window or 0 for layer in sliding)
    held = sequence_bytes(sliding, plan.context) / plan.bytes_per_sequence
    read = decode_bytes(sliding, plan.context) / plan.decode_bytes
    share = (
        f"At a context of {plan.context} they hold {held:.1%} of a sequence's bytes and read {read:.1%} of a decode "
        "step's: their window bounds both, so quantizing them gains little"
    )
    if window <= VLLM_SKIPPED_WINDOW:
        return (
            f"Skip the {_count_of(sliding, 'sliding-window layer')} (--skip-layers sliding_window). {share}. In vLLM "
            "skipping them took gpt-oss-20b (window 128) from 80% to 71% of bfloat16's latency per token of context, "
            f"and the break-even from 22k to 7.7k tokens ({_VLLM})."
        )
    return (
        f"Consider --skip-layers sliding_window for the {_count_of(sliding, 'sliding-window layer')}. {share}. Weigh "
        f"that against the memory: vLLM skips windows of {VLLM_SKIPPED_WINDOW} and quantizes windows of 512 ({_VLLM})."
    )


def _skipping_changes_nothing(situation: Situation) -> str | None:
    if "sliding_window" not in skip_items(situation.skip_layers):
        return None
    if any(layer.kind in SLIDING_KINDS for layer in situation.layers):
        return None
    return "--skip-layers sliding_window skips nothing: no layer of this model has a sliding window."


def _edges_need_no_guard(situation: Situation) -> str | None:
    edges = [item for item in skip_items(situation.skip_layers) if str(item).startswith(("first:", "last:"))]
    if not edges or not situation.quantized:
        return None
    return (
        f"{', '.join(map(str, edges))} is not needed here: keeping the edges of a model unquantized guards K of 3 to 4 "
        "bits against the large key biases of the first and last layers of Qwen2 and Qwen2.5, and 8 bits of K are "
        "themselves such a guard (llama.cpp #21385). It costs the bytes of these layers."
    )


def _calibrate_per_tensor_scales(situation: Situation) -> str | None:
    per_tensor = [layer for layer in situation.quantized if _has_per_tensor_scale(layer)]
    scheme = (text_config(situation.config).get("quantization_config") or {}).get("kv_cache_scheme")
    if not per_tensor or scheme:
        return None
    int8 = situation.by_mode["int8_per_token_head"].layers
    int8_bytes = sum(int8[layer.index].bytes_per_token for layer in per_tensor)
    our_bytes = sum(layer.bytes_per_token for layer in per_tensor)
    return (
        "Calibrate k_scale and v_scale, or take int8_per_token_head, which needs no calibration and stores "
        f"{int8_bytes:.0f} bytes per token in these layers where this stores {our_bytes:.0f}. With one scale of 1.0 "
        "per layer, fp8_e4m3 lost 1 to 2 points in reasoning and kept 94 to 98% of the long-context retrieval of "
        f"bfloat16 ({_VLLM}). Does not apply to scales calibrated on data."
    )


def _short_context(situation: Situation) -> str | None:
    if not situation.quantized or situation.plan.context >= VLLM_BREAK_EVEN:
        return None
    us = DECODE_US["1x1k"]
    return (
        f"Expect memory and not speed from a context of {situation.plan.context}: fp8 broke even with bfloat16 at "
        f"7.0k tokens (Llama-3.1-8B, H100, {_VLLM}), and kvq decodes one sequence of 1k keys in "
        f"{us['int8_per_token_head']:.1f} us a layer from int8, {us['bfloat16']:.1f} from bfloat16 (H200, {_RESULTS}). "
        "Large batches gain earlier."
    )


def _prefill_of_large_heads(situation: Situation) -> str | None:
    layouts = [
        layer.layout for layer in situation.quantized if layer.layout and not isinstance(layer.layout, MLALayout)
    ]
    head_dim = max((layout.head_dim for layout in layouts), default=0)
    if head_dim < 256:
        return None
    return (
        f"Measure prefill: heads of {head_dim} elements are the case where fp8 attention lost, 1.6 times the "
        f"quadratic part of bfloat16's time to the first token (Gemma-4-E2B, H100, {_VLLM}). kvq multiplies no fp8 by "
        "fp8, so that figure is a warning and not a prediction. Does not apply if decoding dominates."
    )


def _states_are_not_counted(situation: Situation) -> str | None:
    recurrent = [layer for layer in situation.layers if layer.kind == "linear_attention" or "hybrid" in layer.kind]
    if not recurrent:
        return None
    return (
        f"Leave memory for the states of {_count_of(recurrent, 'recurrent layer')}: they have one size per sequence at "
        "every context, stay as they are, and are not counted here."
    )


def _quantized_windows(situation: Situation) -> tuple[LayerPolicy, ...]:
    """Quantized layers whose sliding window is shorter than the context."""
    return tuple(
        layer
        for layer in situation.quantized
        if layer.kind in SLIDING_KINDS and (layer.window or 0) < situation.plan.context
    )


def _has_per_tensor_scale(layer: LayerPolicy) -> bool:
    return layer.layout is not None and any(mode.is_per_tensor for mode in modes_of(layer.layout))


def _count_of(layers: Iterable[LayerPolicy], noun: str) -> str:
    count = len(tuple(layers))
    return f"{count} {noun}{'' if count == 1 else 's'}"


_RULES: tuple[Callable[[Situation], str | None], ...] = (
    _one_sequence_fits,
    _what_quantizing_gains,
    _skip_sliding_windows,
    _skipping_changes_nothing,
    _calibrate_per_tensor_scales,
    _short_context,
    _prefill_of_large_heads,
    _edges_need_no_guard,
    _states_are_not_counted,
)
