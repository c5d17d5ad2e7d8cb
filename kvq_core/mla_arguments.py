"""Checks of the MLA ops, as `kvq_core.arguments` for their siblings."""

from __future__ import annotations

from typing import TypeVar

from kvq_core.arguments import (
    FLOAT_DTYPES,
    INDEX_DTYPES,
    ArraySpec,
    AttentionCall,
    _check_bool,
    _check_cu_seqlens_q,
    _check_dtype,
    _check_number,
    _check_pages,
    _check_rows_contiguous,
    _check_sequences,
    _check_shape,
    _check_vector,
    check_count,
)
from kvq_core.layout import CacheLayout
from kvq_core.mla import MLALayout

Kind = TypeVar("Kind", CacheLayout, MLALayout)


def check_kind(layout: CacheLayout | MLALayout, kind: type[Kind]) -> Kind:
    """Return ``layout`` if it is of the kind, `CacheLayout` or `MLALayout`, that an op is made for.

    Raises:
        TypeError: it is of the other.
    """
    if isinstance(layout, kind):
        return layout
    ops = "append_mla, gather_mla and mla_attention" if kind is CacheLayout else "append_kv and its siblings"
    raise TypeError(
        f"expected a cache with a {kind.__name__}; got one with a {type(layout).__name__}, {layout.fingerprint()}. "
        f"It goes with {ops}"
    )


def check_append_mla(
    layout: MLALayout, pages: ArraySpec, kv_c: ArraySpec, k_pe: ArraySpec, slot_mapping: ArraySpec
) -> None:
    """Check the arguments of ``append_mla``.

    Args:
        layout: the layout of ``pages``.
        pages: uint8 ``[num_pages, 1, record_bytes]``.
        kv_c: bfloat16, float16 or float32 ``[num_tokens, kv_lora_rank]``, last axis contiguous.
        k_pe: the same with ``rope_dim``; its dtype may differ from that of ``kv_c``.
        slot_mapping: int32 or int64 ``[num_tokens]``.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_pages(pages, layout)
    for name, spec, dim_name in (("kv_c", kv_c, "kv_lora_rank"), ("k_pe", k_pe, "rope_dim")):
        _check_dtype(name, spec, FLOAT_DTYPES)
        _check_shape(name, spec, {"num_tokens": None, dim_name: getattr(layout, dim_name)})
        _check_rows_contiguous(name, spec)
    if k_pe.shape[0] != kv_c.shape[0]:
        raise ValueError(f"expected as many tokens in k_pe as in kv_c, {kv_c.shape[0]}; got {k_pe.shape[0]}")
    _check_vector("slot_mapping", slot_mapping, INDEX_DTYPES, "num_tokens", kv_c.shape[0])


def check_gather_mla(layout: MLALayout, pages: ArraySpec, page_table: ArraySpec, seq_lens: ArraySpec) -> None:
    """Check the arguments of ``gather_mla``.

    Args:
        layout: the layout of ``pages``.
        pages: uint8 ``[num_pages, 1, record_bytes]``.
        page_table: int32 ``[num_seqs, max_pages]``, contiguous.
        seq_lens: int32 ``[num_seqs]``, contiguous.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    _check_pages(pages, layout)
    _check_sequences(page_table, seq_lens)


def check_mla_attention(layout: MLALayout, call: AttentionCall) -> None:
    """Check the arguments of ``mla_attention``.

    Args:
        layout: the layout of ``pages``.
        call: its arguments:
            q: bfloat16, float16 or float32 ``[num_q_tokens, num_heads, kv_lora_rank + rope_dim]``, last axis
                contiguous.
            pages: uint8 ``[num_pages, 1, record_bytes]``.
            page_table: int32 ``[num_seqs, max_pages]``, contiguous.
            seq_lens: int32 ``[num_seqs]``, contiguous.
            cu_seqlens_q: int32 ``[num_seqs + 1]``, contiguous; None for one query per sequence.
            max_seqlen_q: an integer from 1, or None.
            sm_scale: a finite number.
            causal: a bool.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    q = call.q
    _check_pages(call.pages, layout)
    _check_dtype("q", q, FLOAT_DTYPES)
    _check_shape("q", q, {"num_q_tokens": None, "num_heads": None, "kv_lora_rank + rope_dim": layout.head_dim})
    _check_rows_contiguous("q", q)
    if q.shape[1] == 0:
        raise ValueError("expected q with at least one head; got num_heads=0")
    num_seqs = _check_sequences(call.page_table, call.seq_lens)
    _check_cu_seqlens_q(call.cu_seqlens_q, q.shape[0], num_seqs)
    _check_bool("causal", call.causal)
    check_count("max_seqlen_q", call.max_seqlen_q)
    if call.sm_scale is None:
        raise TypeError("expected sm_scale to be a Python number; got None. It depends on the head size before MLA")
    _check_number("sm_scale", call.sm_scale)
