"""The byte format, version 1: where every code and scale of a KV cache lies (DESIGN.md section 3).

The cache of one layer is ``uint8[num_pages, num_kv_heads, record_bytes]``. A record is one page of one KV head and
holds, each at a multiple of 16 bytes, the fields ``k_codes``, ``v_codes``, ``k_scales``, ``v_scales``.
"""

from __future__ import annotations

import functools
import re
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import Any

import numpy as np

from kvq_core.modes import KVQuantMode, get_kv_quant_mode, parse_kv_cache_dtype

FORMAT_VERSION = 1
FIELD_ALIGNMENT = 16  # bytes: one vector load, and what NVIDIA's cp.async needs
MAX_HEAD_DIM = 512

_FINGERPRINT = re.compile(r"kvq1-(tail)-k:(\w+)-v:(\w+)-p(\d+)-h(\d+)-dk(\d+)-dv(\d+)")


@dataclass(frozen=True)
class Field:
    """One field of a record: ``page_size`` rows of ``row_bytes`` bytes, from byte ``offset`` of the record."""

    offset: int
    row_bytes: int
    dtype: np.dtype


@dataclass(frozen=True)
class CacheLayout:
    """The byte layout of one layer's KV cache.

    Args:
        kv_cache_dtype: a mode name, a pair ``"K/V"``, or ``"auto"`` for ``compute_dtype``.
        page_size: tokens in a page ("block" elsewhere), from 1.
        num_kv_heads: KV heads of the whole layer, before any sharding.
        head_dim: elements of a K row, a multiple of 16 from 16 to 512.
        head_dim_v: elements of a V row; ``head_dim`` if None.
        scale_placement: ``"tail"``, scales behind the codes of the record.
        compute_dtype: what ``"auto"`` stands for: a name or a dtype of numpy, torch or JAX.

    Raises:
        ValueError: an unknown mode or placement, ``"auto"`` without ``compute_dtype``, a count below 1.
        NotImplementedError: a head dimension that is no multiple of 16 or above 512; ``scale_placement="row"``.
    """

    kv_cache_dtype: str
    _: KW_ONLY
    page_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int = None  # pyright: ignore[reportAssignmentType]  (resolved in __post_init__)
    scale_placement: str = "tail"
    compute_dtype: InitVar[Any] = None

    def __post_init__(self, compute_dtype: Any) -> None:
        object.__setattr__(self, "kv_cache_dtype", _canonical_kv_cache_dtype(self.kv_cache_dtype, compute_dtype))
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        for name in ("page_size", "num_kv_heads", "head_dim", "head_dim_v"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        for name in ("head_dim", "head_dim_v"):
            _check_head_dim(name, getattr(self, name))
        _check_scale_placement(self.scale_placement)

    @property
    def k_mode(self) -> KVQuantMode:
        """The mode of K."""
        return parse_kv_cache_dtype(self.kv_cache_dtype)[0]

    @property
    def v_mode(self) -> KVQuantMode:
        """The mode of V."""
        return parse_kv_cache_dtype(self.kv_cache_dtype)[1]

    @functools.cached_property
    def fields(self) -> dict[str, Field]:
        """The fields of a record by name, in the order of their offsets."""
        fields, offset = {}, 0
        for name, row_bytes, dtype in self._rows():
            fields[name] = Field(offset, row_bytes, dtype)
            offset = _align(offset + self.page_size * row_bytes)
        return fields

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of one page of one KV head."""
        last = list(self.fields.values())[-1]
        return _align(last.offset + self.page_size * last.row_bytes)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of all KV heads."""
        return self.record_bytes * self.num_kv_heads

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token in one layer, all KV heads, K and V, scales and padding included."""
        return self.page_bytes / self.page_size

    def shape(self, num_pages: int) -> tuple[int, int, int]:
        """The shape of a pool of ``num_pages`` pages: ``(num_pages, num_kv_heads, record_bytes)``, uint8."""
        return (num_pages, self.num_kv_heads, self.record_bytes)

    def shard(self, num_shards: int) -> CacheLayout:
        """The layout of one of ``num_shards`` equal shards over KV heads (tensor parallelism, axis 1 of the pages).

        Raises:
            ValueError: ``num_kv_heads`` is no multiple of ``num_shards``.
        """
        if num_shards < 1 or self.num_kv_heads % num_shards:
            raise ValueError(
                f"expected a divisor of num_kv_heads={self.num_kv_heads}; got num_shards={num_shards}. "
                "Replicate KV heads first if there are more shards than heads."
            )
        return CacheLayout(
            self.kv_cache_dtype,
            page_size=self.page_size,
            num_kv_heads=self.num_kv_heads // num_shards,
            head_dim=self.head_dim,
            head_dim_v=self.head_dim_v,
            scale_placement=self.scale_placement,
        )

    def fingerprint(self) -> str:
        """The exact name of the format. Caches exchange pages if and only if their fingerprints are equal."""
        return (
            f"kvq{FORMAT_VERSION}-{self.scale_placement}-k:{self.k_mode.value}-v:{self.v_mode.value}"
            f"-p{self.page_size}-h{self.num_kv_heads}-dk{self.head_dim}-dv{self.head_dim_v}"
        )

    @classmethod
    def from_fingerprint(cls, fingerprint: str) -> CacheLayout:
        """The layout that `fingerprint` names.

        Raises:
            ValueError: ``fingerprint`` is not of this format version, or malformed.
        """
        match = _FINGERPRINT.fullmatch(fingerprint)
        if match is None:
            raise ValueError(
                "expected a fingerprint like "
                "'kvq1-tail-k:int8_per_token_head-v:int8_per_token_head-p16-h8-dk128-dv128'; "
                f"got {fingerprint!r}"
            )
        placement, k_mode, v_mode, *counts = match.groups()
        page_size, num_kv_heads, head_dim, head_dim_v = map(int, counts)
        return cls(
            f"{k_mode}/{v_mode}",
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            scale_placement=placement,
        )

    def _rows(self):
        """(name, bytes of a row, dtype) of each field that is present, in order."""
        sides = (("k", self.k_mode, self.head_dim), ("v", self.v_mode, self.head_dim_v))
        for side, mode, dim in sides:
            yield f"{side}_codes", dim * mode.code_dtype.itemsize, mode.code_dtype
        for side, mode, _ in sides:
            if mode.is_per_token_head:
                yield f"{side}_scales", 4, np.dtype("<f4")


def _canonical_kv_cache_dtype(kv_cache_dtype: str, compute_dtype: Any) -> str:
    """Resolve ``auto`` and aliases; one name if both sides agree, else ``K/V``."""
    sides = [_resolve_auto(side, compute_dtype) for side in str(kv_cache_dtype).split("/")]
    k_mode, v_mode = parse_kv_cache_dtype("/".join(sides))
    return k_mode.value if k_mode is v_mode else f"{k_mode.value}/{v_mode.value}"


def _resolve_auto(name: str, compute_dtype: Any) -> str:
    if name != "auto":
        return name
    if compute_dtype is None:
        raise ValueError("kv_cache_dtype='auto' stands for the model's dtype: pass compute_dtype, e.g. 'bfloat16'")
    dtype_name = getattr(compute_dtype, "__name__", str(compute_dtype)).removeprefix("torch.")
    mode = get_kv_quant_mode(dtype_name)
    if mode.is_quantized:
        raise ValueError(f"expected compute_dtype bfloat16, float16 or float32; got {compute_dtype!r}")
    return mode.value


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < 1:
        raise ValueError(f"expected {name} to be an integer from 1; got {value!r}")
    return value.__index__()


def _check_head_dim(name: str, value: int) -> None:
    if value % 16 or value > MAX_HEAD_DIM:
        raise NotImplementedError(
            f"expected {name} to be a multiple of 16 from 16 to {MAX_HEAD_DIM}; got {value}. "
            "Pad the head with zeros to the next multiple of 16."
        )


def _check_scale_placement(scale_placement: str) -> None:
    if scale_placement == "row":
        raise NotImplementedError("scale_placement='row' (vLLM's container) is not supported yet; use 'tail'")
    if scale_placement != "tail":
        raise ValueError(f"expected scale_placement 'tail' or 'row'; got {scale_placement!r}")


def _align(offset: int) -> int:
    return -(-offset // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
