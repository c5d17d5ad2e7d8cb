"""The byte format of an MLA cache (multi-head latent attention): one latent row and one rope row a token.

A record holds the fields ``latent_codes``, ``rope_codes`` and, in a per-token-head mode, ``latent_scales``. Byte for
byte it is a record of one KV head whose K is the latent and whose V is the rope part: ``MLALayout.records``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import KW_ONLY, dataclass

from kvq_core.layout import FORMAT_VERSION, CacheLayout, Field, _check_head_dim, _count
from kvq_core.modes import KVQuantMode, get_kv_quant_mode

MLA_MODES = ("bfloat16", "fp8_e4m3", "int8_per_token_head", "fp8_per_token_head")

_FINGERPRINT = re.compile(r"kvq1-mla-latent:(\w+)-rope:(\w+)-p(\d+)-dl(\d+)-dr(\d+)")
_FIELDS = {"k_codes": "latent_codes", "v_codes": "rope_codes", "k_scales": "latent_scales"}


@dataclass(frozen=True)
class MLALayout:
    """The byte layout of one layer's MLA cache.

    The latent is stored in ``kv_cache_dtype``; with one scale per token (``int8_per_token_head``,
    ``fp8_per_token_head``) the rope part stays in bfloat16, else it is stored like the latent. ``fp8_e4m3`` has one
    scale for both, ``k_scale`` of the cache; ``v_scale`` means nothing.

    Args:
        kv_cache_dtype: ``"bfloat16"``, ``"fp8_e4m3"`` (``"fp8"``), ``"int8_per_token_head"``, ``"fp8_per_token_head"``.
        page_size: tokens in a page, from 1.
        kv_lora_rank: elements of the latent, a multiple of 16 from 16 to 512.
        rope_dim: elements of the rope part, a multiple of 16 from 16 to 512.

    Raises:
        ValueError: an unknown mode, a pair of modes, a count below 1.
        NotImplementedError: another mode; a dimension that is no multiple of 16 or above 512.
    """

    kv_cache_dtype: str
    _: KW_ONLY
    page_size: int
    kv_lora_rank: int = 512
    rope_dim: int = 64

    def __post_init__(self) -> None:
        mode = get_kv_quant_mode(self.kv_cache_dtype)
        if mode.value not in MLA_MODES:
            raise NotImplementedError(f"expected an MLA cache in a mode of {MLA_MODES}; got {mode.value!r}")
        object.__setattr__(self, "kv_cache_dtype", mode.value)
        for name in ("page_size", "kv_lora_rank", "rope_dim"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        for name in ("kv_lora_rank", "rope_dim"):
            _check_head_dim(name, getattr(self, name))

    @property
    def mode(self) -> KVQuantMode:
        """The mode of the latent."""
        return KVQuantMode(self.kv_cache_dtype)

    @property
    def rope_mode(self) -> KVQuantMode:
        """The mode of the rope part."""
        return KVQuantMode.BFLOAT16 if self.mode.is_per_token_head else self.mode

    @property
    def num_kv_heads(self) -> int:
        """One: all query heads read the same rows."""
        return 1

    @property
    def axes(self) -> tuple[str, ...]:
        """What the axes of the pages are: those of records."""
        return self.records.axes

    @property
    def head_axis(self) -> int:
        """The axis of the pages with the one head."""
        return self.records.head_axis

    @property
    def has_rows(self) -> bool:
        """False: an MLA cache is held in records."""
        return self.records.has_rows

    @property
    def head_dim(self) -> int:
        """Elements of a key as attention sees it, ``[latent | rope]``."""
        return self.kv_lora_rank + self.rope_dim

    @property
    def head_dim_v(self) -> int:
        """Elements of a value as attention sees it, the latent."""
        return self.kv_lora_rank

    @functools.cached_property
    def records(self) -> CacheLayout:
        """The same bytes as a cache of one KV head: K is the latent, V the rope part."""
        return CacheLayout(
            f"{self.mode.value}/{self.rope_mode.value}",
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.kv_lora_rank,
            head_dim_v=self.rope_dim,
        )

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of a record by name, in the order of their offsets."""
        return {_FIELDS[name]: field for name, field in self.records.fields.items()}

    @property
    def record_bytes(self) -> int:
        """Bytes of one page."""
        return self.records.record_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: there is one head."""
        return self.records.page_bytes

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in one layer, scale and padding included."""
        return self.records.bytes_per_token

    def shape(self, num_pages: int) -> tuple[int, ...]:
        """The shape of a pool of ``num_pages`` pages: ``(num_pages, 1, record_bytes)``, uint8."""
        return self.records.shape(num_pages)

    def fingerprint(self) -> str:
        """The exact name of the format. Caches exchange pages if and only if their fingerprints are equal."""
        return (
            f"kvq{FORMAT_VERSION}-mla-latent:{self.mode.value}-rope:{self.rope_mode.value}"
            f"-p{self.page_size}-dl{self.kv_lora_rank}-dr{self.rope_dim}"
        )

    @classmethod
    def from_fingerprint(cls, fingerprint: str) -> MLALayout:
        """The layout that `fingerprint` names.

        Raises:
            ValueError: ``fingerprint`` is not of an MLA cache of this format version, or malformed.
        """
        match = _FINGERPRINT.fullmatch(fingerprint)
        if match is not None:
            mode, _, *counts = match.groups()
            page_size, kv_lora_rank, rope_dim = map(int, counts)
            layout = cls(mode, page_size=page_size, kv_lora_rank=kv_lora_rank, rope_dim=rope_dim)
            if layout.fingerprint() == fingerprint:
                return layout
        raise ValueError(
            "expected a fingerprint like 'kvq1-mla-latent:int8_per_token_head-rope:bfloat16-p64-dl512-dr64'; "
            f"got {fingerprint!r}"
        )


def layout_from_fingerprint(fingerprint: str) -> CacheLayout | MLALayout:
    """The layout, of either kind, that ``fingerprint`` names.

    Raises:
        ValueError: ``fingerprint`` is not of this format version, or malformed.
    """
    kind = MLALayout if "-mla-" in fingerprint else CacheLayout
    return kind.from_fingerprint(fingerprint)
