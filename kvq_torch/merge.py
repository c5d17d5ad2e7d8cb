"""Attention in parts: the results over disjoint sets of keys become that over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kvq_core.arguments import ArraySpec, check_merge_states
from kvq_torch._interop import array_spec


def merge_states(
    outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge attention over disjoint sets of keys: ``lse = log sum exp(lse_i)``, ``out = sum exp(lse_i - lse) out_i``.

    The parts are what ``paged_attention(..., return_lse=True)`` gave for the same queries over the keys of each: a
    shared prefix and what follows it, or the shards of a context. Keys before the queries are attended to with
    ``causal=False``, and ``sinks`` are given to one part only, or they would count once a part. ``window`` and
    ``alibi_slopes`` look at positions, which a part counts from its own keys: they do not merge.

    A part with lse -inf saw no key and is left out, whatever its values. A part with lse NaN or +inf makes the result
    NaN. A NaN or an infinity among the values of any other part reaches the result, however small the part's share.
    It is plain torch in float32: safe in CUDA graphs and under ``torch.compile``. See FlashInfer,
    https://arxiv.org/abs/2501.01005.

    Args:
        outs: bfloat16, float16 or float32 ``[num_parts, num_q_tokens, num_q_heads, head_dim_v]``, or a sequence of
            parts, which saves stacking them.
        lses: float32 ``[num_parts, num_q_tokens, num_q_heads]``, natural logarithms, or a sequence of parts.

    Returns:
        Values ``[num_q_tokens, num_q_heads, head_dim_v]`` in the dtype of ``outs`` and log-sum-exp, float32
        ``[num_q_tokens, num_q_heads]``; zeros and -inf where no part saw a key.

    Raises:
        TypeError, ValueError: an argument is not as above, there is no part, or parts lie on different devices.
    """
    check_merge_states(_specs("outs", outs), _specs("lses", lses))
    _check_one_device(outs, lses)
    stacked = torch.stack(list(lses))
    peak = stacked.amax(0)
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    weights = (stacked - shift).exp()
    total = weights.sum(0)
    weights = weights / total.masked_fill(total == 0, 1.0)
    merged = torch.zeros(outs[0].shape, dtype=torch.float32, device=total.device)
    for out, lse, weight in zip(outs, stacked, weights.unsqueeze(-1), strict=True):
        values = out.float().masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0)
        merged += torch.where(values.isfinite(), weight * values, weight + values)
    return merged.to(outs[0].dtype), shift + total.log()


def _specs(name: str, parts: torch.Tensor | Sequence[torch.Tensor]) -> ArraySpec | list[ArraySpec]:
    if isinstance(parts, torch.Tensor):
        return array_spec(parts)
    if not isinstance(parts, Sequence) or not all(isinstance(part, torch.Tensor) for part in parts):
        raise TypeError(f"expected {name} to be a torch.Tensor or a sequence of them; got {type(parts).__name__}")
    return [array_spec(part) for part in parts]


def _check_one_device(outs: torch.Tensor | Sequence[torch.Tensor], lses: torch.Tensor | Sequence[torch.Tensor]) -> None:
    device = outs[0].device
    for name, parts in (("outs", outs), ("lses", lses)):
        for i, part in enumerate(parts):
            if part.device != device:
                raise ValueError(
                    f"expected {name}[{i}] on the device of outs[0], {str(device)!r}; got {str(part.device)!r}. "
                    "Gather the parts first"
                )
