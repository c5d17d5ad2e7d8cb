"""Inputs of the conformance cases: rows that are hard to encode, strided views, slots, pools full of traps.

Everything is drawn from a generator whose seed follows from the name of the case.
"""

from __future__ import annotations

import itertools
import zlib

import ml_dtypes
import numpy as np

from kvq_core import CacheLayout, MLALayout, reference

POISON = 0xFF  # a NaN in every float format but int8, and a NaN scale
GARBAGE_IDS = (-1, 2**31 - 1, -(2**31), 10**6, -7)
_INT8_TIES = [code + 0.5 for code in range(-127, 127)]
_E4M3_CODES = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
_E5M2_CODES = np.arange(0x7C, dtype=np.uint8).view(ml_dtypes.float8_e5m2).astype(np.float64)


def records_of(layout: CacheLayout | MLALayout) -> CacheLayout:
    """The layout of the same bytes with a K and a V side: of an MLA cache, the latent and the rope part."""
    return layout.records if isinstance(layout, MLALayout) else layout


def generator(name: str) -> np.random.Generator:
    """A generator that depends on ``name`` alone."""
    return np.random.default_rng(zlib.crc32(name.encode()))


def as_dtype(values: np.ndarray, dtype: str) -> np.ndarray:
    """Finite values rounded to ``dtype``, those past its range to its largest."""
    largest = float(ml_dtypes.finfo(dtype).max)
    return np.clip(values, -largest, largest).astype(np.float32).astype(dtype)


def random_rows(rng: np.random.Generator, shape: tuple[int, ...], dtype: str, exponents: tuple[float, float]):
    """Normal values ``[num_tokens, ...]``, every token of an amplitude of its own, ``10**uniform(*exponents)``."""
    amplitudes = 10 ** rng.uniform(*exponents, (shape[0], *[1] * (len(shape) - 1)))
    return as_dtype(rng.standard_normal(shape) * amplitudes, dtype)


def edge_rows(rng: np.random.Generator, dtype: str, dim: int) -> np.ndarray:
    """Rows ``[n, dim]`` of ties, zeros, subnormals, extremes, infinities and NaN, then rows of every amplitude."""
    rows = [*_tie_rows(dtype, dim), *_special_rows(rng, dtype, dim)]
    exponents = (-9, 4.5) if dtype == "float16" else (-9, 9)
    return np.concatenate([np.stack(rows), random_rows(rng, (12, dim), dtype, exponents)])


def _tie_rows(dtype: str, dim: int):
    """Values halfway between codes, in rows whose absolute maximum makes the scale 1."""
    for anchor, ties in (
        (127.0, _INT8_TIES),
        (448.0, (_E4M3_CODES[1:] + _E4M3_CODES[:-1]) / 2),
        (57344.0, (_E5M2_CODES[1:] + _E5M2_CODES[:-1]) / 2),
    ):
        for start in range(0, len(ties), dim - 1):
            row = np.zeros(dim)
            chunk = np.asarray(ties[start : start + dim - 1])
            row[0], row[1 : 1 + len(chunk)] = anchor, chunk
            yield as_dtype(row * (-1) ** np.arange(dim), dtype)


def _special_rows(rng: np.random.Generator, dtype: str, dim: int):
    info = ml_dtypes.finfo(dtype)
    sign, mantissa = 1 << (info.bits - 1), 1 << info.nmant
    infinity = sign - mantissa
    uniform = {
        "zeros": [0],
        "negative zeros": [sign],
        "mixed zeros": [0, sign],
        "subnormals": [1, mantissa - 1, sign | 1, 2, sign | (mantissa - 1), mantissa >> 1],
        "least normals": [mantissa, sign | mantissa, mantissa + 1, mantissa - 1],
        "largest": [infinity - 1, sign | (infinity - 1)],
        "largest and others": [infinity - 1, 0, 1, sign | mantissa, infinity - mantissa],
        "infinities": [infinity, sign | infinity],
        "NaN": [infinity + 1, infinity | (mantissa >> 1), sign | infinity | (mantissa - 1)],
    }
    for pattern in uniform.values():
        yield np.resize(np.array(pattern, f"u{info.bits // 8}"), dim).view(dtype)
    for bits in (infinity, sign | infinity, infinity | (mantissa >> 1), infinity + 1, sign | infinity | (mantissa - 1)):
        row = as_dtype(rng.standard_normal(dim), dtype)
        row.view(f"u{info.bits // 8}")[rng.integers(dim)] = bits
        yield row
    for absmax in (1e-6, 1.27e-4, 4.48e-4, 1e-7):  # around the least scale
        yield as_dtype(np.linspace(-absmax, absmax, dim), dtype)


def edge_tokens(rng: np.random.Generator, dtype: str, num_heads: int, dim: int) -> np.ndarray:
    """`edge_rows` as tokens ``[num_tokens, num_heads, dim]``, shuffled."""
    rows = rng.permutation(edge_rows(rng, dtype, dim))
    num_tokens = -(-len(rows) // num_heads)
    return rows[np.arange(num_tokens * num_heads) % len(rows)].reshape(num_tokens, num_heads, dim)


def with_strides(x: np.ndarray, kind: str | None) -> np.ndarray:
    """``x [num_tokens, num_heads, dim]`` as a view into a larger poisoned buffer.

    "fused": a slice of a fused qkv tensor; "transposed": of ``[num_heads, num_tokens, dim]``; "odd": rows that start at
    no multiple of 16 bytes.
    """
    if kind is None:
        return x
    (tokens, heads, dim), size = x.shape, x.itemsize
    strides, offset = {
        "fused": ((3 * heads * dim, dim), heads * dim),
        "transposed": ((dim, tokens * dim), 0),
        "odd": ((heads * (dim + 3) + 1, dim + 3), 1),
    }[kind]
    buffer = np.full((tokens * 3 * heads * dim + 4 * (tokens * heads + 1)) * 4 + 16, POISON, np.uint8)
    view = np.ndarray(x.shape, x.dtype, buffer, offset * size, (strides[0] * size, strides[1] * size, size))
    view[...] = x
    return view


def poisoned_pool(layout: CacheLayout | MLALayout, num_pages: int, kind: str | None = None) -> np.ndarray:
    """Pages of 0xFF, dense or as a view into a larger or otherwise ordered array.

    "shared": every other page of a pool twice as large. Of row containers only: "padded" has 36 bytes before each page,
    "gaps" 8 bytes behind each row, "transposed" slots and heads in the other order, "head-major" every page of a head
    before the next head.
    """
    shape = layout.shape(num_pages)
    if kind is None:
        return np.full(shape, POISON, np.uint8)
    if kind == "shared":
        return np.full((num_pages, 2, *shape[1:]), POISON, np.uint8)[:, 1]
    if kind == "gaps":
        return np.full((*shape[:-1], shape[-1] + 8), POISON, np.uint8)[..., : shape[-1]]
    if kind == "padded":
        buffer = np.full((num_pages, 36 + layout.page_bytes), POISON, np.uint8)
        strides = (buffer.shape[1], *np.empty(shape, np.uint8).strides[1:])
        return np.ndarray(shape, np.uint8, buffer, 36, strides)
    order = {"transposed": (0, 2, 1, 3), "head-major": (1, 0, 2, 3)}[kind]
    return np.full([shape[axis] for axis in order], POISON, np.uint8).transpose(order)


def root(x: np.ndarray) -> np.ndarray:
    """The contiguous buffer that ``x`` is a view of; ``x`` itself if it is contiguous."""
    while not x.flags.c_contiguous and isinstance(x.base, np.ndarray):
        x = x.base
    return x


def copy_view(x: np.ndarray) -> np.ndarray:
    """``x`` as the same view of a copy of its buffer."""
    buffer = root(x).copy()
    offset = x.__array_interface__["data"][0] - root(x).__array_interface__["data"][0]
    return np.ndarray(x.shape, x.dtype, buffer, offset, x.strides) if x.size else x.copy()


def make_table(
    rng: np.random.Generator, layout: CacheLayout | MLALayout, seq_lens: list[int], shared_pages: int, spare_pages: int
) -> tuple[list[list[int]], int]:
    """Pages of each sequence in random order, and the size of the pool; the first ``shared_pages`` are of all."""
    counts = [-(-seq_len // layout.page_size) for seq_len in seq_lens]
    total = sum(counts) + spare_pages
    ids = iter(rng.permutation(total).tolist())
    table = [list(itertools.islice(ids, count)) for count in counts]
    for pages in table[1:]:
        pages[:shared_pages] = table[0][: min(shared_pages, len(pages))]
    return table, total


def pad_table(rng: np.random.Generator, table: list[list[int]], max_pages: int) -> np.ndarray:
    """int32 ``[num_seqs, max_pages]``: rows cut off, or continued with garbage."""
    rows = rng.choice(np.array(GARBAGE_IDS, np.int32), (len(table), max_pages))
    for row, pages in zip(rows, table, strict=True):
        row[: len(pages)] = pages[:max_pages]
    return rows


def fill_pool(
    layout: CacheLayout,
    pages: np.ndarray,
    table: list[list[int]],
    seq_lens: list[int],
    k: np.ndarray,
    v: np.ndarray,
    scales: tuple[float, float],
) -> None:
    """Write the tokens of all sequences, one after the other in k and v; what they do not own stays poisoned."""
    slots = [
        seq_pages[t // layout.page_size] * layout.page_size + t % layout.page_size
        for seq_pages, seq_len in zip(table, seq_lens, strict=True)
        for t in range(seq_len)
    ]
    reference.append_kv(layout, pages, k, v, np.array(slots, np.int64), *scales)
