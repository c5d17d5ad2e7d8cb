"""Which layer of a model gets which mode: from a Hugging Face config and a request, the layout of every layer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from kvq_core.layout import CacheLayout, _canonical_kv_cache_dtype
from kvq_core.mla import MLALayout
from kvq_core.model_config import SLIDING_KINDS, LayerShape, read_compute_dtype, read_layers

SkipLayers = str | int | range | Iterable[str | int | range]

_SKIP_FORMS = "an index, a range 'a-b' (both ends skipped), 'sliding_window', 'first:N' or 'last:N'"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")
_EDGE = re.compile(r"(first|last):(\d+)")


@dataclass(frozen=True)
class LayerPolicy:
    """How one layer of a model caches its keys and values.

    Attributes:
        index: position of the layer in the model, from 0.
        kind: the word of transformers' ``layer_types``, e.g. ``"sliding_attention"``.
        kv_cache_dtype: the canonical mode or pair ``"K/V"``; None if the layer keeps no keys and values.
        layout: the layout of the pages that the layer reads; None if it reads none.
        window: tokens that a query of the layer sees at most; None if all.
        shares_kv_with: index of the earlier layer whose pages it reads; None if it has its own.
    """

    index: int
    kind: str
    kv_cache_dtype: str | None = None
    layout: CacheLayout | MLALayout | None = None
    window: int | None = None
    shares_kv_with: int | None = None

    @property
    def owns_pages(self) -> bool:
        """Whether pages must be allocated for this layer."""
        return self.layout is not None and self.shares_kv_with is None

    @property
    def is_quantized(self) -> bool:
        """Whether K or V is stored as codes with scales."""
        modes = () if self.layout is None else modes_of(self.layout)
        return any(mode.is_quantized for mode in modes)

    @property
    def bytes_per_token(self) -> float:
        """Bytes that this layer stores for one token: the layout's figure, 0 without pages of its own."""
        return self.layout.bytes_per_token if self.layout is not None and self.owns_pages else 0.0


def modes_of(layout: CacheLayout | MLALayout):
    """The modes of K and of V, or of the latent and of the rope part."""
    return (layout.mode, layout.rope_mode) if isinstance(layout, MLALayout) else (layout.k_mode, layout.v_mode)


def layer_policies(
    config: Any,
    kv_cache_dtype: str,
    *,
    skip_layers: SkipLayers = (),
    page_size: int = 16,
    compute_dtype: str | None = None,
) -> tuple[LayerPolicy, ...]:
    """The mode and the layout of every layer of a model.

    A skipped layer stays in ``compute_dtype``. Layers that share one KV cache are skipped together, if one of them is.

    Args:
        config: a dict of a Hugging Face ``config.json``, or a configuration object of transformers.
        kv_cache_dtype: a mode name, a pair ``"K/V"``, or ``"auto"`` for ``compute_dtype``.
        skip_layers: one or more, also separated by commas, of: an index; a range ``"a-b"``, both ends included, or a
            Python ``range``; ``"sliding_window"``, the layers with a sliding window; ``"first:N"`` and ``"last:N"``.
        page_size: tokens in a page.
        compute_dtype: what skipped layers and ``"auto"`` are stored in; if None, the 16-bit dtype of the config, or
            bfloat16 where it names none or float32.

    Raises:
        ValueError: an unknown mode or word, an index outside the model, a config that lacks a field.
        NotImplementedError: a head dimension, a kind of layer or a mode of MLA that kvq does not support.
    """
    shapes = read_layers(config)
    compute_dtype = compute_dtype or read_compute_dtype(config)
    wanted = _canonical_kv_cache_dtype(kv_cache_dtype, compute_dtype)
    unquantized = _canonical_kv_cache_dtype("auto", compute_dtype)
    skipped = {_owner(shapes[index]) for index in skipped_layers(shapes, skip_layers)}
    return tuple(
        _layer_policy(shape, unquantized if _owner(shape) in skipped else wanted, page_size) for shape in shapes
    )


def skipped_layers(layers: tuple[LayerShape, ...], skip_layers: SkipLayers) -> frozenset[int]:
    """The indices that ``skip_layers`` (see `layer_policies`) names.

    Raises:
        ValueError: an unknown word, or an index outside the model.
    """
    return frozenset(index for item in skip_items(skip_layers) for index in _select(layers, item))


def skip_items(skip_layers: SkipLayers) -> list[str | range]:
    """The items of ``skip_layers``: words, indices as text, and ranges."""
    items = [skip_layers] if isinstance(skip_layers, str | int | range) else list(skip_layers)
    split = [[item] if isinstance(item, range) else str(item).split(",") for item in items]
    return [item if isinstance(item, range) else item.strip() for items in split for item in items if item != ""]


def _select(layers: tuple[LayerShape, ...], item: str | range) -> Iterable[int]:
    count = len(layers)
    if item == "sliding_window":
        return [layer.index for layer in layers if layer.kind in SLIDING_KINDS]
    if isinstance(item, str) and (match := _EDGE.fullmatch(item)):
        edge, num = match[1], int(match[2])
        named = range(num) if edge == "first" else range(count - num, count)
    elif isinstance(item, str) and (match := _RANGE.fullmatch(item)):
        named = range(int(match[1]), int(match[2] or match[1]) + 1)
    elif isinstance(item, range):
        named = item
    else:
        raise ValueError(f"expected skip_layers of {_SKIP_FORMS}; got {item!r}")
    if not named or min(named) < 0 or max(named) >= count:
        raise ValueError(f"expected skip_layers to name layers from 0 to {count - 1}; got {item!r}")
    return named


def _owner(shape: LayerShape) -> int:
    """The layer whose pages this one reads."""
    return shape.index if shape.shares_kv_with is None else shape.shares_kv_with


def _layer_policy(shape: LayerShape, kv_cache_dtype: str, page_size: int) -> LayerPolicy:
    if not shape.num_kv_heads:
        return LayerPolicy(shape.index, shape.kind)
    try:
        layout = _layout(shape, kv_cache_dtype, page_size)
    except NotImplementedError as error:
        raise NotImplementedError(f"layer {shape.index} ({shape.kind}): {error}") from error
    return LayerPolicy(shape.index, shape.kind, kv_cache_dtype, layout, shape.window, shape.shares_kv_with)


def _layout(shape: LayerShape, kv_cache_dtype: str, page_size: int) -> CacheLayout | MLALayout:
    if not shape.kv_lora_rank:
        return CacheLayout(
            kv_cache_dtype,
            page_size=page_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            head_dim_v=shape.head_dim_v,
        )
    if "/" in kv_cache_dtype:
        raise ValueError(f"an MLA cache has no K and V sides: expected one mode; got {kv_cache_dtype!r}")
    return MLALayout(kv_cache_dtype, page_size=page_size, kv_lora_rank=shape.kv_lora_rank, rope_dim=shape.rope_dim)
