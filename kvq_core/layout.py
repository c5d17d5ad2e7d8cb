"""The byte format, version 1: where every code and scale of a KV cache lies (DESIGN.md section 3).

The cache of one layer is ``uint8[num_pages, num_kv_heads, record_bytes]``. A record is one page of one KV head and
holds, each at a multiple of 16 bytes, the fields ``k_codes``, ``v_codes``, ``k_scales``, ``v_scales``.

``scale_placement="row"`` is the container of vLLM (0.26 and later), ``uint8[num_pages, num_kv_heads, page_size,
row_bytes]``: a row holds one token of one KV head, ``[k_codes | k_scales | v_codes | v_scales]`` without gaps.
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

_FINGERPRINT = re.compile(r"kvq1-(tail|row)-k:(\w+)-v:(\w+)-p(\d+)-h(\d+)-dk(\d+)-dv(\d+)(?:-(NHD))?")

RECORD_AXES = ("num_pages", "num_kv_heads", "record_bytes")
ROW_AXES = {  # named as FlashInfer and vLLM name them: N slots of a page, H heads, D bytes
    "HND": ("num_pages", "num_kv_heads", "page_size", "row_bytes"),
    "NHD": ("num_pages", "page_size", "num_kv_heads", "row_bytes"),
}


@dataclass(frozen=True)
class Field:
    """One field: for each of ``page_size`` tokens a row of ``row_bytes`` bytes.

    They follow one another from byte ``offset`` of the record, or lie at byte ``offset`` of each row of the container.
    """

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
        scale_placement: ``"tail"``, scales behind the codes of the record: the default and the fast one. ``"row"``,
            scales behind the codes of each token, as in a container of vLLM: to read and write such a one in place.
        row_order: the order of the axes of a row container: ``"HND"``, heads before slots, or ``"NHD"``. An array whose
            strides say where its rows lie (torch, numpy) can always be viewed as ``"HND"``; JAX arrays are dense.
        compute_dtype: what ``"auto"`` stands for: a name or a dtype of numpy, torch or JAX.

    Raises:
        ValueError: an unknown mode, placement or order, ``"NHD"`` without ``scale_placement="row"``, ``"auto"`` without
            ``compute_dtype``, a count below 1.
        NotImplementedError: a head dimension that is no multiple of 16 or above 512.
    """

    kv_cache_dtype: str
    _: KW_ONLY
    page_size: int
    num_kv_heads: int
    head_dim: int
    head_dim_v: int = None  # pyright: ignore[reportAssignmentType]  (resolved in __post_init__)
    scale_placement: str = "tail"
    row_order: str = "HND"
    compute_dtype: InitVar[Any] = None

    def __post_init__(self, compute_dtype: Any) -> None:
        object.__setattr__(self, "kv_cache_dtype", _canonical_kv_cache_dtype(self.kv_cache_dtype, compute_dtype))
        if self.head_dim_v is None:
            object.__setattr__(self, "head_dim_v", self.head_dim)
        for name in ("page_size", "num_kv_heads", "head_dim", "head_dim_v"):
            object.__setattr__(self, name, _count(name, getattr(self, name)))
        for name in ("head_dim", "head_dim_v"):
            _check_head_dim(name, getattr(self, name))
        _check_placement(self.scale_placement, self.row_order)

    def __hash__(self) -> int:
        """Of one field, because every launch of an op looks a layout up, and few layouts of a process share a mode."""
        return hash(self.kv_cache_dtype)

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
        """The fields of a record, or of a row of a row container, by name, in the order of their offsets."""
        fields, offset = {}, 0
        for name, row_bytes, dtype in self._rows():
            fields[name] = Field(offset, row_bytes, dtype)
            offset = offset + row_bytes if self.has_rows else _align(offset + self.page_size * row_bytes)
        return fields

    @property
    def has_rows(self) -> bool:
        """Whether pages are a row container, with an axis of slots, and not records."""
        return self.scale_placement == "row"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the axes of a pool."""
        return ROW_AXES[self.row_order] if self.has_rows else RECORD_AXES

    @property
    def head_axis(self) -> int:
        """The axis of a pool that KV heads lie on, and that shards divide."""
        return self.axes.index("num_kv_heads")

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes of one token of one KV head, without padding: a row of a row container."""
        return sum(field.row_bytes for field in self.fields.values())

    @functools.cached_property
    def record_bytes(self) -> int:
        """Bytes of one page of one KV head."""
        if self.has_rows:
            return self.page_size * self.row_bytes
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

    def shape(self, num_pages: int) -> tuple[int, ...]:
        """The shape of a pool of ``num_pages`` pages, uint8, by its `axes`."""
        return (num_pages, *(getattr(self, axis) for axis in self.axes[1:]))

    def shard(self, num_shards: int) -> CacheLayout:
        """The layout of one of ``num_shards`` equal shards over KV heads (tensor parallelism, axis `head_axis`).

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
            row_order=self.row_order,
        )

    def fingerprint(self) -> str:
        """The exact name of the format. Caches exchange pages if and only if their fingerprints are equal."""
        return (
            f"kvq{FORMAT_VERSION}-{self.scale_placement}-k:{self.k_mode.value}-v:{self.v_mode.value}"
            f"-p{self.page_size}-h{self.num_kv_heads}-dk{self.head_dim}-dv{self.head_dim_v}"
            + ("-NHD" if self.row_order == "NHD" else "")
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
        placement, k_mode, v_mode, *counts, row_order = match.groups()
        page_size, num_kv_heads, head_dim, head_dim_v = map(int, counts)
        return cls(
            f"{k_mode}/{v_mode}",
            page_size=page_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            scale_placement=placement,
            row_order=row_order or "HND",
        )

    def _rows(self):
        """(name, bytes of a row, dtype) of each field that is present, in order."""
        rows = []
        for side, mode, dim in (("k", self.k_mode, self.head_dim), ("v", self.v_mode, self.head_dim_v)):
            rows.append((f"{side}_codes", dim * mode.code_dtype.itemsize, mode.code_dtype))
            if mode.is_per_token_head:
                rows.append((f"{side}_scales", 4, np.dtype("<f4")))
        return rows if self.has_rows else sorted(rows, key=lambda row: row[0].endswith("_scales"))


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


def _check_placement(scale_placement: str, row_order: str) -> None:
    if scale_placement not in ("tail", "row"):
        raise ValueError(f"expected scale_placement 'tail' or 'row'; got {scale_placement!r}")
    if row_order not in ROW_AXES:
        raise ValueError(f"expected row_order 'HND' or 'NHD'; got {row_order!r}")
    if row_order != "HND" and scale_placement != "row":
        raise ValueError(
            f"expected row_order 'HND' with scale_placement={scale_placement!r}; got {row_order!r}. "
            "Records have no axis of slots; a row container has one (scale_placement='row')"
        )


def _align(offset: int) -> int:
    return -(-offset // FIELD_ALIGNMENT) * FIELD_ALIGNMENT
