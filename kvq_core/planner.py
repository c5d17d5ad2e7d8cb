"""The memory planner: how many tokens fit, in how many pages, and how many bytes a decode step reads.

Launch plans of kernels are another thing, in `kvq_core.plan`.
"""

from __future__ import annotations

import bisect
import functools
import re
from dataclasses import KW_ONLY, dataclass

from kvq_core.layout import _count
from kvq_core.policy import LayerPolicy

_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmgt]?i?b)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


@dataclass(frozen=True)
class MemoryPlan:
    """What fits into a memory when every sequence is ``context`` tokens long.

    A layer that sees all tokens holds ``ceil(context / page_size)`` pages of a sequence. A layer with a window holds at
    most the pages that ``window`` consecutive tokens can touch, ``ceil((window - 1) / page_size) + 1``: pages that slid
    out of the window are given back. Prefill needs the pages of its chunk beside them for a moment, and a recurrent
    layer keeps a state; neither is counted.

    Args:
        layers: what `kvq_core.policy.layer_policies` returned.
        context: tokens of a sequence, from 1.
        memory: bytes for KV pages of all layers.

    Raises:
        ValueError: no layer has pages, ``context`` below 1, ``memory`` below 0.
    """

    layers: tuple[LayerPolicy, ...]
    _: KW_ONLY
    context: int
    memory: int

    def __post_init__(self) -> None:
        _count("context", self.context)
        if self.memory < 0:
            raise ValueError(f"expected memory to be a number of bytes from 0; got {self.memory}")
        if not any(layer.owns_pages for layer in self.layers):
            raise ValueError("expected a model with layers that keep keys and values; this one has none")

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in all layers, before any window forgets it."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def bytes_per_sequence(self) -> int:
        """Bytes of the pages of one sequence of ``context`` tokens."""
        return sequence_bytes(self.layers, self.context)

    @property
    def num_sequences(self) -> int:
        """Whole sequences of ``context`` tokens that fit."""
        return self.memory // self.bytes_per_sequence

    @property
    def tokens(self) -> int:
        """Tokens of context that fit: those of the whole sequences, and of a shorter one in what is left."""
        return self.num_sequences * self.context + self._last_tokens

    @property
    def num_pages(self) -> tuple[int, ...]:
        """Pages to allocate for each layer, so that ``tokens`` fit; 0 without pages of its own."""
        return tuple(
            self.num_sequences * num_pages(layer, self.context) + num_pages(layer, self._last_tokens)
            for layer in self.layers
        )

    @property
    def decode_bytes(self) -> float:
        """Bytes of keys and values that one decode step of one sequence of ``context`` tokens reads."""
        return decode_bytes(self.layers, self.context)

    @functools.cached_property
    def _last_tokens(self) -> int:
        left = self.memory - self.num_sequences * self.bytes_per_sequence
        lengths = range(self.context + 1)
        return bisect.bisect_right(lengths, left, key=lambda length: sequence_bytes(self.layers, length)) - 1


def num_pages(layer: LayerPolicy, num_tokens: int) -> int:
    """Pages that ``layer`` holds, at most, of a sequence of ``num_tokens`` tokens; 0 without pages of its own."""
    if layer.layout is None or not layer.owns_pages:
        return 0
    pages = -(-num_tokens // layer.layout.page_size)
    if layer.window is None:
        return pages
    return min(pages, -(-(layer.window - 1) // layer.layout.page_size) + 1)


def sequence_bytes(layers: tuple[LayerPolicy, ...], num_tokens: int) -> int:
    """Bytes of the pages that ``layers`` hold of a sequence of ``num_tokens`` tokens."""
    return sum(num_pages(layer, num_tokens) * layer.layout.page_bytes for layer in layers if layer.layout is not None)


def decode_bytes(layers: tuple[LayerPolicy, ...], num_tokens: int) -> float:
    """Bytes that one query reads in ``layers`` when it sees a sequence of ``num_tokens`` tokens.

    Layers that share pages read them once each. Padding of the records is counted as read.
    """
    return sum(
        layer.layout.bytes_per_token * min(num_tokens, layer.window or num_tokens)
        for layer in layers
        if layer.layout is not None
    )


def parse_bytes(text: str) -> int:
    """The bytes that ``text`` means: ``"141GB"`` is 141e9, ``"141GiB"`` is 141 * 2**30, a bare number is bytes.

    Raises:
        ValueError: not a number, or another unit than B, KB, MB, GB, TB, KiB, MiB, GiB, TiB.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[2] or "").lower() == "ib":
        raise ValueError(f"expected a size like '141GB' (10**9), '141GiB' (2**30) or a number of bytes; got {text!r}")
    prefix = (match[2] or "b").lower().removesuffix("b")
    base = 1024 if prefix.endswith("i") else 1000
    return int(float(match[1]) * base ** _POWERS[prefix.removesuffix("i")])
