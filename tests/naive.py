"""The yardstick of DESIGN.md section 4: attention on the dequantized cache, in the query's dtype, summed in float32."""

from __future__ import annotations

import numpy as np

from kvq_core import MLALayout, reference
from tests.case_types import AttentionCase, AttentionInputs
from tests.inputs import records_of


@np.errstate(all="ignore")
def naive_attention(case: AttentionCase, inputs: AttentionInputs) -> tuple[np.ndarray, np.ndarray]:
    """Values ``[num_q_tokens, num_q_heads, head_dim_v]`` in q's dtype and log-sum-exp, float32.

    Right for the queries that see no NaN and no key outside the pool; others may get anything.
    """
    q, dtype = inputs.q, inputs.q.dtype
    num_kv_heads = inputs.pages.shape[case.layout.head_axis]
    group = q.shape[1] // num_kv_heads
    out = np.zeros((*q.shape[:2], case.layout.head_dim_v), dtype)
    lse = np.full(q.shape[:2], -np.inf, np.float32)
    where = inputs.pages, inputs.page_table, inputs.seq_lens
    k, v = reference.gather_kv(records_of(case.layout), *where, inputs.k_scale, inputs.v_scale)
    if isinstance(case.layout, MLALayout):
        k, v = np.concatenate([k, v], axis=-1), k
    k, v = (np.repeat(x.astype(dtype).astype(np.float32), group, axis=2) for x in (k, v))
    v = np.where(np.isfinite(v), v, np.float32(0))
    ends = np.arange(1, len(inputs.seq_lens) + 1) if inputs.cu_seqlens_q is None else inputs.cu_seqlens_q[1:]
    start = 0
    for seq, (seq_len, end) in enumerate(zip(inputs.seq_lens.tolist(), ends.tolist(), strict=True)):
        num_keys = max(0, min(seq_len, k.shape[1]))
        positions = np.arange(start, end) - end + seq_len
        rows = slice(start, end)
        out[rows], lse[rows] = _attend(case, inputs, q[rows], k[seq, :num_keys], v[seq, :num_keys], positions)
        start = end
    return out, lse


@np.errstate(all="ignore")
def naive_merge(outs: list[np.ndarray], lses: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """`kvq_core.reference.merge_states` in float32, right where no part is NaN or infinite."""
    stacked = np.stack(lses)
    unseen, peak = stacked == -np.inf, stacked.max(0)
    weights = np.where(unseen, np.float32(0), np.exp(stacked - peak))
    total = weights.sum(0)
    values = np.where(unseen[..., None], np.float32(0), np.stack(outs).astype(np.float32))
    values = (weights[..., None] * values).sum(0)
    values = np.where(total[..., None] == 0, np.float32(0), values / total[..., None])
    return values.astype(outs[0].dtype), peak + np.log(total)


def _attend(case: AttentionCase, inputs: AttentionInputs, q, k, v, positions):
    keys = np.arange(len(k))
    distance = keys - positions[:, None]  # [queries, keys]
    visible = np.ones(distance.shape, bool) if not case.causal else distance <= 0
    if case.window is not None:
        visible &= distance > -case.window
    sm_scale = np.float32(q.shape[-1] ** -0.5 if case.sm_scale is None else case.sm_scale)
    scores = _dot(q.astype(np.float32).swapaxes(0, 1), k.transpose(1, 2, 0)) * sm_scale  # [heads, queries, keys]
    if case.softcap is not None:
        scores = np.float32(case.softcap) * np.tanh(scores / np.float32(case.softcap))
    if inputs.alibi_slopes is not None:
        scores = scores + inputs.alibi_slopes[:, None, None] * distance.astype(np.float32)
    scores = np.where(visible, scores, np.float32(-np.inf))
    sinks = np.full(q.shape[1], -np.inf, np.float32) if inputs.sinks is None else inputs.sinks
    peak = np.maximum(scores.max(-1, initial=-np.inf), sinks[:, None])
    peak = np.where(peak == -np.inf, np.float32(0), peak)
    p = np.exp(scores - peak[..., None])
    total = p.sum(-1) + np.exp(sinks[:, None] - peak)
    out = _dot(p.astype(q.dtype).astype(np.float32), v.swapaxes(0, 1))
    out = np.where(total[..., None] == 0, np.float32(0), out / total[..., None])
    return out.swapaxes(0, 1).astype(q.dtype), (peak + np.log(total)).swapaxes(0, 1)


def _dot(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``x @ y`` summed in float32, one product after the other: a BLAS sums in an order of its own on every machine."""
    total = np.zeros((*x.shape[:-1], y.shape[-1]), np.float32)
    for i in range(x.shape[-1]):
        total += x[..., i, None] * y[..., i, None, :]
    return total
