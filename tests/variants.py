"""The rows of the tables of what is supported where: what a user calls a variant, and which cases cover it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvq_core import MLALayout
from tests.case_types import AppendCase, AttentionCase, CopyCase, GatherCase
from tests.parts import MergeCase

Condition = Callable[[Any], bool]


def mode_of(case: Any) -> tuple[str, ...]:
    return (case.layout.kv_cache_dtype,)


def q_dtype_of(case: Any) -> tuple[str, ...]:
    return (case.q_dtype,)


def head_dims_of(case: Any) -> tuple[int, ...]:
    return case.layout.head_dim, case.layout.head_dim_v


def latent_dims_of(case: Any) -> tuple[int, ...]:
    return case.layout.kv_lora_rank, case.layout.rope_dim


def page_size_of(case: Any) -> tuple[int, ...]:
    return (case.layout.page_size,)


def group_of(case: Any) -> tuple[int, ...]:
    return (case.group,)


@dataclass(frozen=True)
class Variant:
    """A row of a table.

    Attributes:
        name: what a user calls it.
        covers: whether a case is one; several conditions, one for each operation, must all be met by some case.
        values: what a cell lists of a case, modes or numbers.
        drawn: whether the properties of `tests.test_properties` draw it.
        not_in: frameworks that do not have it.
    """

    name: str
    covers: Condition | tuple[Condition, ...]
    values: Callable[[Any], Iterable[str | int]] = mode_of
    drawn: bool = True
    not_in: tuple[str, ...] = ()

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """``covers`` as a tuple."""
        return self.covers if isinstance(self.covers, tuple) else (self.covers,)

    def covered(self, cases: Iterable[Any]) -> set[str | int]:
        """The values that the cases cover in every operation."""
        cases = tuple(cases)
        values = [
            {value for case in cases if covers(case) for value in self.values(case)} for covers in self.conditions
        ]
        return set.intersection(*values)


def anything(case: Any) -> bool:
    return True


def records(case_type: type, condition: Condition = anything) -> Condition:
    """Cases of a type over the records of a KV cache."""
    return lambda case: isinstance(case, case_type) and not (is_mla(case) or case.layout.has_rows) and condition(case)


def attention(condition: Condition = anything) -> Condition:
    """Attention over the records of a KV cache."""
    return records(AttentionCase, condition)


def rows(strided: bool) -> tuple[Condition, ...]:
    """Writing, reading and attending to row containers that are dense arrays, or that have strides."""
    return tuple(
        lambda case, case_type=case_type: (
            isinstance(case, case_type) and case.layout.has_rows and bool(case.pool) == strided
        )
        for case_type in (AppendCase, GatherCase, AttentionCase)
    )


def mla(case_type: type, condition: Condition = anything) -> Condition:
    """Cases of a type over an MLA cache."""
    return lambda case: isinstance(case, case_type) and is_mla(case) and condition(case)


def mla_attention(condition: Condition = anything) -> Condition:
    """Attention over an MLA cache."""
    return mla(AttentionCase, condition)


def is_mla(case: Any) -> bool:
    return isinstance(case.layout, MLALayout)


def has_padded_pages(case: Any) -> bool:
    return bool(case.pool)


def has_strides(case: Any) -> bool:
    return bool(case.strides)


def has_shared_pages(case: AttentionCase) -> bool:
    return case.shared_pages > 0


def most_queries(case: AttentionCase) -> int:
    return max((count for count, _ in case.seqs), default=0)


def is_decode(case: AttentionCase) -> bool:
    return not case.ragged and bool(case.seqs)


def is_speculative(case: AttentionCase) -> bool:
    """Whether the caller says that a sequence has few queries, and some have more than one."""
    return case.max_seqlen_q is not None and 2 <= most_queries(case) <= case.max_seqlen_q <= 16


def is_prefill(case: AttentionCase) -> bool:
    return most_queries(case) > 16


def is_mixed_batch(case: AttentionCase) -> bool:
    return is_prefill(case) and any(count == 1 for count, _ in case.seqs)


def is_not_causal(case: AttentionCase) -> bool:
    return not case.causal


def has_scales(case: AttentionCase) -> bool:
    """Whether a per-tensor mode has a scale other than 1."""
    layout: Any = case.layout
    sides = ((layout.k_mode, case.k_scale), (layout.v_mode, case.v_scale))
    return any(mode.is_per_tensor and scale != 1 for mode, scale in sides)


VARIANTS = (
    Variant("append", records(AppendCase)),
    Variant("gather", records(GatherCase)),
    Variant("copy pages", lambda case: isinstance(case, CopyCase) and not is_mla(case), drawn=False),
    Variant("decode", attention(is_decode)),
    Variant("speculative decode, 2 to 16 queries", attention(is_speculative)),
    Variant("prefill, chunked or whole", attention(is_prefill)),
    Variant("decode and prefill in one batch", attention(is_mixed_batch)),
    Variant("sliding window", attention(lambda case: case.window)),
    Variant("softcap", attention(lambda case: case.softcap)),
    Variant("sinks", attention(lambda case: case.sinks)),
    Variant("ALiBi", attention(lambda case: case.alibi)),
    Variant("not causal", attention(is_not_causal)),
    Variant("scales per tensor other than 1", attention(has_scales)),
    Variant("pages shared by sequences", attention(has_shared_pages), drawn=False),
    Variant("`merge_states` over parts", records(MergeCase), drawn=False),
    Variant("row containers", rows(strided=False)),
    Variant("row containers with strides", rows(strided=True), drawn=False, not_in=("jax",)),
    Variant(
        "padding between pages",
        tuple(records(case_type, has_padded_pages) for case_type in (AppendCase, GatherCase, AttentionCase)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant(
        "strided `q`, `k`, `v`",
        (records(AppendCase, has_strides), attention(has_strides)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant("dtype of `q`", attention(), q_dtype_of),
    Variant("`head_dim`, `head_dim_v`", attention(), head_dims_of),
    Variant("`page_size`", attention(), page_size_of),
    Variant("query heads per KV head", attention(), group_of),
)

MLA_VARIANTS = (
    Variant("`append_mla`", mla(AppendCase), drawn=False),
    Variant("`gather_mla`", mla(GatherCase), drawn=False),
    Variant("decode", mla_attention(is_decode)),
    Variant("speculative decode, 2 to 16 queries", mla_attention(is_speculative)),
    Variant("prefill, chunked or whole", mla_attention(is_prefill), drawn=False),
    Variant("decode and prefill in one batch", mla_attention(is_mixed_batch), drawn=False),
    Variant("not causal", mla_attention(is_not_causal)),
    Variant("pages shared by sequences", mla_attention(has_shared_pages), drawn=False),
    Variant(
        "padding between pages",
        (mla(AppendCase, has_padded_pages), mla_attention(has_padded_pages)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant(
        "strided `q`, `kv_c`, `k_pe`",
        (mla(AppendCase, has_strides), mla_attention(has_strides)),
        drawn=False,
        not_in=("jax",),
    ),
    Variant("dtype of `q`", mla_attention(), q_dtype_of),
    Variant("`kv_lora_rank`, `rope_dim`", mla_attention(), latent_dims_of),
    Variant("`page_size`", mla_attention(), page_size_of),
    Variant("query heads", mla_attention(), group_of),
)
