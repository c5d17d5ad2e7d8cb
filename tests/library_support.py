"""What prefill through cuDNN takes, for the README: what its tests cover, and what its plan says that it needs."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

from kvq_core import CacheLayout, MLALayout
from kvq_core.arguments import ArraySpec, AttentionCall
from kvq_core.plan import DeviceFacts, LibraryPlan, plan_library_attention
from tests import test_conformance, test_library_prefill
from tests.case_types import AttentionCase
from tests.variants import Variant, attention, has_padded_pages, has_scales, has_shared_pages, has_strides, mode_of

HOPPER = DeviceFacts("cuda", 90, 132)


class Implementation(NamedTuple):
    """``impl`` of a framework, the cases that its tests run, and what it refuses that the other takes."""

    framework: str
    impl: str
    cases: tuple[AttentionCase, ...]
    refused: tuple[str, ...] = ()


IMPLEMENTATIONS = (
    Implementation("torch", "sdpa", tuple(case for case, _ in test_library_prefill.CASES)),
    Implementation(
        "jax", "cudnn", tuple(test_library_prefill.WHOLE_PROMPTS), tuple(test_library_prefill.REFUSED_IN_JAX)
    ),
)
VARIANTS = (
    Variant("sinks", attention(lambda case: case.sinks), not_in=("jax",)),
    Variant("scales per tensor other than 1", attention(has_scales)),
    Variant("pages shared by sequences", attention(has_shared_pages)),
    Variant("row containers", lambda case: case.layout.has_rows),
    Variant("padding between pages", attention(has_padded_pages), not_in=("jax",)),
    Variant("strided `q`", attention(has_strides), not_in=("jax",)),
)


def modes(implementation: Implementation) -> set[str | int]:
    """The modes that its tests cover."""
    return Variant("prefill", attention(), mode_of).covered(implementation.cases)


def variants(implementation: Implementation) -> list[str]:
    """The names of the variants that its tests cover."""
    return [variant.name for variant in VARIANTS if variant.covered(implementation.cases)]


def needs() -> list[str]:
    """What the plan says that it needs when it refuses cases of the conformance tests.

    It is asked about each as it is, about a prompt with the options of each, and about one that is too long.
    """
    cases = [case for case in test_conformance.ATTENTION_CASES if not isinstance(case.layout, MLALayout)]
    large = CacheLayout("bfloat16", page_size=16, num_kv_heads=8, head_dim=128)
    too_long = AttentionCase("too-long", large, seqs=((4096, 2**20),), ragged=True, max_seqlen_q=4096)
    plans = [plan_of(case, None) for case in cases]
    plans += [plan_of(as_prompt(case), 130) for case in cases]
    plans += [plan_of(too_long, 2**20)]
    reasons = [re.fullmatch("expected (.*); got .*", plan) for plan in plans if isinstance(plan, str)]
    return sorted({reason[1] for reason in reasons if reason}, key=str.lower)


def as_prompt(case: AttentionCase) -> AttentionCase:
    """Queries in the only kind of batch that the plan takes, with the options of ``case``."""
    return dataclasses.replace(case, seqs=((70, 130),), ragged=True, max_seqlen_q=70, padding_rows=0)


def plan_of(case: AttentionCase, max_seqlen_k: int | None) -> LibraryPlan | str:
    """The plan of a case on an H200, from shapes alone."""
    layout, num_seqs = case.layout, len(case.seqs)
    assert isinstance(layout, CacheLayout)
    num_q_tokens = sum(count for count, _ in case.seqs) + case.padding_rows
    num_q_heads = case.group * layout.num_kv_heads
    width = max((-(-length // layout.page_size) for _, length in case.seqs), default=0) + case.spare_columns
    per_head = _spec("float32", num_q_heads)
    options: dict[str, Any] = case.options()
    call = AttentionCall(
        _spec(case.q_dtype, num_q_tokens, num_q_heads, layout.head_dim),
        _spec("uint8", *layout.shape(num_seqs * max(0, width))),
        _spec("int32", num_seqs, max(0, width)),
        _spec("int32", num_seqs),
        cu_seqlens_q=_spec("int32", num_seqs + 1) if case.ragged else None,
        sinks=per_head if case.sinks else None,
        alibi_slopes=per_head if case.alibi else None,
        **options,
    )
    return plan_library_attention(layout, call, max_seqlen_k, HOPPER)


def _spec(dtype: str, *shape: int) -> ArraySpec:
    return ArraySpec(dtype, shape, tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))))
