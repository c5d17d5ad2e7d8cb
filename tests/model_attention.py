"""The small Llama of tests/model with a replaceable attention: transformers calls what the caller passes in.

A call ``attend(layer_index, q, k, v, sm_scale)`` gets float32 numpy arrays ``[num_tokens, num_heads, head_dim]``, the
sequences one after the other, the keys rotated (RoPE) as attention reads them, and returns the values of the queries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers
from torch.nn.functional import scaled_dot_product_attention

from tests.model.train import as_tensor, next_byte_loss

FOLDER = Path(__file__).parent / "model"
ATTENTION = "kvq_tests"

Attend = Callable[[int, np.ndarray, np.ndarray, np.ndarray, float], np.ndarray]


def load_model():
    """The model in float32, its attention left to the ``attend`` that a call brings along."""
    transformers.AttentionInterface.register(ATTENTION, _call_attend)
    transformers.AttentionMaskInterface.register(ATTENTION, _no_mask)
    transformers.utils.logging.disable_progress_bar()
    model = transformers.LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation=ATTENTION)
    return model.eval()


def _call_attend(module, query, key, value, attention_mask, *, scaling, attend: Attend, **kwargs):
    batch = query.shape[0]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous().numpy() for x in (query, key, value))
    values = torch.from_numpy(attend(module.layer_idx, q, k, v, scaling))
    return values.unflatten(0, (batch, -1)), None


def _no_mask(*args, **kwargs):
    """No mask tensor: every sequence has the full length, and ``attend`` is causal."""


def held_out_windows(names: tuple[str, ...], window_bytes: int) -> torch.Tensor:
    """The first bytes of the held-out modules ``names``, int64 ``[len(names), window_bytes]``."""
    files = [FOLDER / "heldout" / f"{name}.txt" for name in names]
    return torch.stack([as_tensor(path.read_bytes()[:window_bytes]).long() for path in files])


@torch.no_grad()
def bits_per_byte(model, windows: torch.Tensor, attend: Attend) -> float:
    """Bits per predicted byte, as tests/model/train.py scores held-out text, with ``attend`` as the attention."""
    nats = next_byte_loss(functools.partial(model, attend=attend), windows, reduction="mean")
    return nats.item() / math.log(2)


class LayerInputs(NamedTuple):
    """What the attention of one layer gets, and its exact values in float64."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    sm_scale: float
    exact: np.ndarray


@dataclass
class Recorder:
    """Unquantized attention over ``num_seqs`` equally long sequences, that keeps the inputs of every layer."""

    num_seqs: int
    layers: list[LayerInputs] = field(default_factory=list)

    def __call__(self, layer_index: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, sm_scale: float) -> np.ndarray:
        exact = self._attend(torch.float64, q, k, v, sm_scale)
        self.layers.append(LayerInputs(q, k, v, sm_scale, exact))
        return self._attend(torch.float32, q, k, v, sm_scale)

    def _attend(self, dtype, q, k, v, sm_scale) -> np.ndarray:
        q, k, v = (torch.from_numpy(x).unflatten(0, (self.num_seqs, -1)).transpose(1, 2).to(dtype) for x in (q, k, v))
        values = scaled_dot_product_attention(q, k, v, is_causal=True, scale=sm_scale, enable_gqa=True)
        return values.transpose(1, 2).flatten(0, 1).numpy()
