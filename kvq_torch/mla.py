"""The public ops of MLA caches: `KVCache` with a `kvq_core.MLALayout`."""

from __future__ import annotations

from typing import Any

import torch

from kvq_core.mla import MLALayout
from kvq_core.mla_arguments import check_kind
from kvq_torch import _mla_library
from kvq_torch.cache import KVCache
from kvq_torch.ops import _INTEGER, _NUMBER, _STRING, _TENSOR, _check_optional, _check_tensors


def append_mla_(
    cache: KVCache, kv_c: torch.Tensor, k_pe: torch.Tensor, slot_mapping: torch.Tensor, *, impl: str | None = None
) -> None:
    """Quantize new tokens and write them to their slots of an MLA cache, in place.

    A slot below 0, or past the pool, drops its token. Of tokens with the same slot one wins whole.

    Args:
        cache: the cache to write; in mode ``fp8_e4m3``, ``k_scale`` is the scale of both parts.
        kv_c: the latents, bfloat16, float16 or float32 ``[num_tokens, kv_lora_rank]``, last axis contiguous.
        k_pe: the rope parts, the same with ``rope_dim``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        impl: ``"triton"`` or ``"eager"``; None for Triton on a GPU, eager torch on a CPU.

    Raises:
        TypeError, ValueError, NotImplementedError: see `append_kv_`.
    """
    check_kind(cache.layout, MLALayout)
    _check_tensors(kv_c=kv_c, k_pe=k_pe, slot_mapping=slot_mapping)
    _check_optional("impl", impl, _STRING)
    _mla_library.append_mla_op(cache.pages, cache.k_scale, kv_c, k_pe, slot_mapping, cache.fingerprint, impl)


def gather_mla(
    cache: KVCache, page_table: torch.Tensor, seq_lens: torch.Tensor, *, impl: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read sequences of an MLA cache back as dense values, ``x = code * scale``.

    Args:
        cache: the cache to read.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        impl: see `append_mla_`.

    Returns:
        Latents ``[num_seqs, max_pages * page_size, kv_lora_rank]`` and rope parts with ``rope_dim``, float32: zero at
        and past each length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError, NotImplementedError: see `append_kv_`.
    """
    check_kind(cache.layout, MLALayout)
    _check_tensors(page_table=page_table, seq_lens=seq_lens)
    _check_optional("impl", impl, _STRING)
    return _mla_library.gather_mla_op(cache.pages, cache.k_scale, page_table, seq_lens, cache.fingerprint, impl)


def mla_attention(
    q: torch.Tensor,
    cache: KVCache,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    sm_scale: float,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    causal: bool = True,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | Any:  # Any: a union with the tuple would make every caller narrow it
    """Attend over the cached latents, ``softmax(sm_scale * q [latent | rope]^T + mask) latent``.

    Query i of a sequence's n queries sits at position ``p = seq_len - n + i`` and sees key j when ``j <= p`` (causal).
    A query that sees a key on a page outside the pool, or past the page table, gets NaN. There is no gradient.

    Args:
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_heads, kv_lora_rank + rope_dim]``, last axis contiguous.
        cache: the MLA cache to read.
        page_table: int32 ``[num_seqs, max_pages]``, the pages of each sequence.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        sm_scale: multiplies the scores; it follows from the head size of the model before its latents.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: no sequence has more queries; ``num_q_tokens`` if None.
        causal: whether a query sees no later key.
        return_lse: whether to return the log-sum-exp too.
        impl: see `append_mla_`.

    Returns:
        ``[num_q_tokens, num_heads, kv_lora_rank]`` in the dtype of q; with ``return_lse`` also the log-sum-exp, float32
        ``[num_q_tokens, num_heads]`` (natural). Rows from ``cu_seqlens_q[-1]`` on, and queries that see no key: zeros,
        -inf.

    Raises:
        TypeError, ValueError, NotImplementedError: see `append_kv_`.
    """
    check_kind(cache.layout, MLALayout)
    _check_tensors(q=q, page_table=page_table, seq_lens=seq_lens)
    _check_optional("cu_seqlens_q", cu_seqlens_q, _TENSOR)
    _check_optional("max_seqlen_q", max_seqlen_q, _INTEGER)
    if sm_scale is None:
        raise TypeError("expected sm_scale to be a Python number; got None")
    _check_optional("sm_scale", sm_scale, _NUMBER)
    if not isinstance(causal, bool):
        raise TypeError(f"expected causal to be True or False; got {causal!r}")
    _check_optional("impl", impl, _STRING)
    arrays = q, cache.pages, cache.k_scale, page_table, seq_lens, cu_seqlens_q
    out, lse = _mla_library.mla_attention_op(*arrays, max_seqlen_q, sm_scale, causal, cache.fingerprint, impl)
    return (out, lse) if return_lse else out
