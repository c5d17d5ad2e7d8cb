"""The public ops. Each one unpacks its cache and calls a custom op of `kvq_torch._library`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kvq_core.layout import CacheLayout
from kvq_core.mla_arguments import check_kind
from kvq_torch import _library
from kvq_torch.cache import KVCache

_INTEGER = (int, np.integer, torch.SymInt)
_NUMBER = (float, np.floating, *_INTEGER)
_TENSOR = (torch.Tensor,)
_STRING = (str,)
_KINDS = {
    _INTEGER: "a Python integer",
    _NUMBER: "a Python number",
    _TENSOR: "a torch.Tensor",
    _STRING: "a string",
}


def append_kv_(
    cache: KVCache, k: torch.Tensor, v: torch.Tensor, slot_mapping: torch.Tensor, *, impl: str | None = None
) -> None:
    """Quantize new tokens and write them to their slots of ``cache``, in place.

    A slot below 0, or past the pool, drops its token. Of tokens with the same slot one wins whole.

    Args:
        cache: the cache to write.
        k: bfloat16, float16 or float32 ``[num_tokens, num_kv_heads, head_dim]``, last axis contiguous.
        v: the same with ``head_dim_v``.
        slot_mapping: int32 or int64 ``[num_tokens]``, ``page * page_size + offset`` of each token.
        impl: ``"triton"`` or ``"eager"``; None for Triton on a GPU, eager torch on a CPU.

    Raises:
        TypeError, ValueError: an argument is not as above, tensors lie on different devices, or ``impl`` is unknown or
            cannot run on the device.
        NotImplementedError: ``impl="sdpa"``.
    """
    check_kind(cache.layout, CacheLayout)
    _check_tensors(k=k, v=v, slot_mapping=slot_mapping)
    _check_optional("impl", impl, _STRING)
    _library.append_kv_op(cache.pages, cache.k_scale, cache.v_scale, k, v, slot_mapping, cache.fingerprint, impl)


def gather_kv(
    cache: KVCache,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read sequences back as dense values, ``x = code * scale``.

    Args:
        cache: the cache to read.
        page_table: int32 ``[num_seqs, max_pages]``.
        seq_lens: int32 ``[num_seqs]``.
        dtype: of the result, float32, bfloat16 or float16.
        impl: see `append_kv_`.

    Returns:
        K ``[num_seqs, max_pages * page_size, num_kv_heads, head_dim]`` and V with ``head_dim_v``: zero at and past each
        length, NaN for the tokens of a page outside the pool.

    Raises:
        TypeError, ValueError, NotImplementedError: see `append_kv_`.
    """
    check_kind(cache.layout, CacheLayout)
    _check_tensors(page_table=page_table, seq_lens=seq_lens)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"expected dtype to be a torch.dtype; got {dtype!r}")
    _check_optional("impl", impl, _STRING)
    return _library.gather_kv_op(
        cache.pages, cache.k_scale, cache.v_scale, page_table, seq_lens, dtype, cache.fingerprint, impl
    )


def copy_pages_(cache: KVCache, src: torch.Tensor, dst: torch.Tensor, *, impl: str | None = None) -> None:
    """Copy page ``src[i]`` to page ``dst[i]``, in place; all sources are read before any is written.

    A pair with an id outside the pool is skipped.

    Args:
        cache: the cache to write.
        src: int32 or int64 ``[num_pairs]``.
        dst: int32 or int64 ``[num_pairs]``, unique and disjoint from ``src``.
        impl: see `append_kv_`.

    Raises:
        TypeError, ValueError, NotImplementedError: see `append_kv_`.
    """
    _check_tensors(src=src, dst=dst)
    _check_optional("impl", impl, _STRING)
    _library.copy_pages_op(cache.pages, src, dst, impl)


def paged_attention(
    q: torch.Tensor,
    cache: KVCache,
    page_table: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    cu_seqlens_q: torch.Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    sm_scale: float | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: str | None = None,
) -> torch.Tensor | Any:  # Any: a union with the tuple would make every caller narrow it
    """Attend over the cached values, ``softmax(sm_scale * q k^T + mask) v``.

    Query i of a sequence's n queries sits at position ``p = seq_len - n + i`` and sees key j when ``j <= p`` (causal)
    and ``j > p - window``. Its score is ``s = sm_scale * q k_j``, then ``softcap * tanh(s / softcap)``, then
    ``+ slope * (j - p)``. A query that sees a key on a page outside the pool, or past the page table, gets NaN. There
    is no gradient.

    Args:
        q: bfloat16, float16 or float32 ``[num_q_tokens, num_q_heads, head_dim]``, last axis contiguous.
        cache: the cache to read; ``num_q_heads`` is a multiple of its KV heads.
        page_table: int32 ``[num_seqs, max_pages]``, the pages of each sequence.
        seq_lens: int32 ``[num_seqs]``, the KV lengths, queries included.
        cu_seqlens_q: int32 ``[num_seqs + 1]`` from 0, the rows of q of each sequence; None for one query each.
        max_seqlen_q: no sequence has more queries; ``num_q_tokens`` if None.
        max_seqlen_k: the KV length to prepare for, ``max_seqlen_q`` if None. Only the time depends on it: where every
            sequence has just this length, a long prefill goes through PyTorch's cuDNN attention (see ``impl``).
        sm_scale: multiplies the scores; ``head_dim**-0.5`` if None.
        causal: whether a query sees no later key.
        window: how many keys up to its position a query sees; None for all.
        softcap: bounds the scores; None for no bound.
        sinks: float32 ``[num_q_heads]``, logits that join the denominator only.
        alibi_slopes: float32 ``[num_q_heads]``.
        return_lse: whether to return the log-sum-exp too.
        impl: ``"triton"``, ``"eager"``, or ``"sdpa"``: pages are read back into bfloat16 (at most 2 GiB), cuDNN
            attends, and a kernel verifies on the device that the lengths are as assumed, and attends where they are
            not. It takes bfloat16 queries, causal, as many in each sequence, no window, softcap or ALiBi, head_dim =
            head_dim_v up to 256. There a V row with an infinity or NaN makes all of the output (and lse) NaN that
            sees it. None takes it on a GPU since Hopper, from 256 queries and 2048 x 2048 queries times keys.

    Returns:
        ``[num_q_tokens, num_q_heads, head_dim_v]`` in the dtype of q; with ``return_lse`` also the log-sum-exp, float32
        ``[num_q_tokens, num_q_heads]`` (natural, sinks included). Rows from ``cu_seqlens_q[-1]`` on, and queries that
        see no key: zeros, -inf (or the sink).

    Raises:
        TypeError, ValueError: see `append_kv_`.
        NotImplementedError: ``impl="sdpa"`` for a call that it does not take.
    """
    check_kind(cache.layout, CacheLayout)
    _check_tensors(q=q, page_table=page_table, seq_lens=seq_lens)
    _check_optional("cu_seqlens_q", cu_seqlens_q, _TENSOR)
    _check_optional("sinks", sinks, _TENSOR)
    _check_optional("alibi_slopes", alibi_slopes, _TENSOR)
    _check_optional("max_seqlen_q", max_seqlen_q, _INTEGER)
    _check_optional("max_seqlen_k", max_seqlen_k, _INTEGER)
    _check_optional("window", window, _INTEGER)
    _check_optional("sm_scale", sm_scale, _NUMBER)
    _check_optional("softcap", softcap, _NUMBER)
    _check_optional("impl", impl, _STRING)
    if not isinstance(causal, bool):
        raise TypeError(f"expected causal to be True or False; got {causal!r}")
    arrays = q, cache.pages, cache.k_scale, cache.v_scale, page_table, seq_lens, cu_seqlens_q
    numbers = max_seqlen_q, max_seqlen_k, sm_scale, causal, window, softcap
    out, lse = _library.paged_attention_op(*arrays, *numbers, sinks, alibi_slopes, cache.fingerprint, impl)
    return (out, lse) if return_lse else out


def _check_tensors(**tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"expected {name} to be a torch.Tensor; got {type(tensor).__name__}")


def _check_optional(name: str, value: object, kind: tuple[type, ...]) -> None:
    """Refuse what the dispatcher would convert: True to 1, and a tensor to a number by reading it back."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, kind)):
        raise TypeError(f"expected {name} to be None or {_KINDS[kind]}; got {value!r} ({type(value).__name__})")
