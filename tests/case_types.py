"""What a conformance case is: plain data, and numpy inputs drawn from a seed that follows from its name.

``pool``: see `tests.inputs.poisoned_pool`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvq_core import CacheLayout, MLALayout
from tests import inputs as make


class AppendInputs(NamedTuple):
    pages: np.ndarray
    k: np.ndarray
    v: np.ndarray
    slots: np.ndarray


@dataclass(frozen=True)
class AppendCase:
    """Tokens into a poisoned pool. ``num_tokens`` None: the edge rows, else random rows of mixed amplitude."""

    name: str
    layout: CacheLayout | MLALayout
    k_dtype: str = "bfloat16"
    v_dtype: str = "bfloat16"
    num_tokens: int | None = None
    slots: str = "shuffled"
    slot_dtype: str = "int32"
    strides: str | None = None
    pool: str | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    tags: frozenset[str] = frozenset()

    def inputs(self) -> AppendInputs:
        rng = make.generator(self.name)
        records = make.records_of(self.layout)
        k = self._rows(rng, self.k_dtype, records.head_dim)
        v = self._rows(rng, self.v_dtype, records.head_dim_v)
        num_tokens = min(len(k), len(v))
        num_pages = -(-num_tokens // self.layout.page_size) + 2
        slots = _slots(rng, self.slots, num_tokens, num_pages * self.layout.page_size).astype(self.slot_dtype)
        pages = make.poisoned_pool(self.layout, num_pages, self.pool)
        return AppendInputs(pages, *(make.with_strides(x[:num_tokens], self.strides) for x in (k, v)), slots)

    def _rows(self, rng: np.random.Generator, dtype: str, dim: int) -> np.ndarray:
        heads = self.layout.num_kv_heads
        if self.num_tokens is None:
            return make.edge_tokens(rng, dtype, heads, dim)
        return make.random_rows(rng, (self.num_tokens, heads, dim), dtype, (-4, 4))


def _slots(rng: np.random.Generator, kind: str, num_tokens: int, capacity: int) -> np.ndarray:
    slots = rng.permutation(capacity)[:num_tokens].astype(np.int64)
    if kind == "dropped":
        outside = [-1, -2, -(2**31), capacity, capacity + 1, 2**31 - 1]
        slots[::2] = np.resize(outside, len(slots[::2]))
    elif kind == "far":  # valid ones after a wrap to 32 bits
        slots[::2] = slots[::2] + rng.choice([2**32, -(2**32), 2**40], len(slots[::2]))
    elif kind == "duplicates":
        slots = slots[rng.integers(0, max(1, num_tokens // 3), num_tokens)]
        slots[::7] = -1
    elif kind == "none":
        slots[:] = -1
    elif kind != "shuffled":
        raise ValueError(kind)
    return slots


class AttentionInputs(NamedTuple):
    q: np.ndarray
    pages: np.ndarray
    page_table: np.ndarray
    seq_lens: np.ndarray
    cu_seqlens_q: np.ndarray | None
    sinks: np.ndarray | None
    alibi_slopes: np.ndarray | None
    k_scale: float
    v_scale: float


@dataclass(frozen=True)
class AttentionCase:
    """Queries over a pool. ``seqs``: (number of queries, KV length) of each sequence.

    ``ragged`` False: one query per sequence and no cu_seqlens_q. ``damage``: see `_damage`. Exponents: of ten, the
    amplitudes of the tokens' rows. Of an MLA cache, k is the latent, v the rope part, and ``v_scale`` is ``k_scale``;
    with ``rope_only`` every other head's query is zero but for its rope part.
    """

    name: str
    layout: CacheLayout | MLALayout
    seqs: tuple[tuple[int, int], ...]
    group: int = 2
    ragged: bool = False
    q_dtype: str = "bfloat16"
    kv_dtype: str = "float32"
    padding_rows: int = 0
    max_seqlen_q: int | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sm_scale: float | None = None
    sinks: bool = False
    alibi: bool = False
    q_exponents: tuple[float, float] = (0, 0)
    rope_only: bool = False
    k_exponents: tuple[float, float] = (0, 0)
    v_exponents: tuple[float, float] = (0, 0)
    k_scale: float = 1.0
    v_scale: float = 1.0
    damage: tuple[str, ...] = ()
    shared_pages: int = 0
    no_pages: bool = False
    spare_columns: int = 2
    strides: str | None = None
    pool: str | None = None
    tags: frozenset[str] = field(default=frozenset())

    def options(self) -> dict:
        """The static arguments of ``paged_attention``, or ``mla_attention``."""
        names = ("max_seqlen_q", "causal", "window", "softcap", "sm_scale")
        if isinstance(self.layout, MLALayout):
            names = ("max_seqlen_q", "causal", "sm_scale")
        return {name: getattr(self, name) for name in names}

    def inputs(self) -> AttentionInputs:
        rng, layout = make.generator(self.name), self.layout
        seq_lens = [seq_len for _, seq_len in self.seqs]
        table, num_pages = make.make_table(rng, layout, seq_lens, self.shared_pages, spare_pages=3)
        pages = make.poisoned_pool(layout, num_pages, self.pool)
        pool = pages[:0] if self.no_pages else pages
        shape, records = (sum(seq_lens), layout.num_kv_heads), make.records_of(layout)
        k = make.random_rows(rng, (*shape, records.head_dim), self.kv_dtype, self.k_exponents)
        v = make.random_rows(rng, (*shape, records.head_dim_v), self.kv_dtype, self.v_exponents)
        for kind in self.damage:
            _damage_rows(kind, self, k, v)
        make.fill_pool(records, pages, table, seq_lens, k, v, (self.k_scale, self.v_scale))
        width = max(map(len, table), default=0) + self.spare_columns
        page_table = make.pad_table(rng, table, max(0, width))
        for kind in self.damage:
            _damage_table(kind, self, page_table, num_pages)
        num_queries = [count for count, _ in self.seqs]
        num_q_heads = self.group * layout.num_kv_heads
        q_shape = (sum(num_queries) + self.padding_rows, num_q_heads, layout.head_dim)
        q = make.random_rows(rng, q_shape, self.q_dtype, self.q_exponents)
        if self.rope_only:
            q[:, ::2, : layout.head_dim_v] = 0
        return AttentionInputs(
            q=make.with_strides(q, self.strides),
            pages=pool,
            page_table=page_table,
            seq_lens=np.array(seq_lens, np.int32),
            cu_seqlens_q=np.cumsum([0, *num_queries]).astype(np.int32) if self.ragged else None,
            sinks=rng.standard_normal(num_q_heads).astype(np.float32) * 3 if self.sinks else None,
            alibi_slopes=2.0 ** -rng.uniform(0, 6, num_q_heads).astype(np.float32) if self.alibi else None,
            k_scale=self.k_scale,
            v_scale=self.v_scale,
        )


def _marked_token(case: AttentionCase) -> int:
    """A key of sequence 0 that half of its queries see (causal)."""
    num_queries, seq_len = case.seqs[0]
    return seq_len - 1 - num_queries // 2


def _damage_rows(kind: str, case: AttentionCase, k: np.ndarray, v: np.ndarray) -> None:
    """ "nan_k", "nan_v": an element of a key that some queries see. "nan_before_window": of keys that none sees."""
    token = _marked_token(case)
    if kind == "nan_k":
        k[token, 0, 3] = np.nan
    elif kind == "nan_v":
        v[token, :, 5] = np.nan
    elif kind == "nan_before_window":
        hidden = _keys_before_windows(case, 0)
        k[:hidden], v[:hidden] = np.nan, np.nan


def _damage_table(kind: str, case: AttentionCase, page_table: np.ndarray, num_pages: int) -> None:
    """ "foreign": the page of a key that some queries see lies outside the pool. "negative": its id is. "garbage": ids
    of pages wholly before every window."""
    column = _marked_token(case) // case.layout.page_size
    if kind == "foreign":
        page_table[0, column] = num_pages
    elif kind == "negative":
        page_table[0, column] = -3
    elif kind == "garbage":
        for seq in range(len(case.seqs)):
            page_table[seq, : _keys_before_windows(case, seq) // case.layout.page_size] = make.GARBAGE_IDS[seq % 5]


def _keys_before_windows(case: AttentionCase, seq: int) -> int:
    num_queries, seq_len = case.seqs[seq]
    return max(0, seq_len - num_queries - case.window + 1)


class GatherInputs(NamedTuple):
    pages: np.ndarray
    page_table: np.ndarray
    seq_lens: np.ndarray


@dataclass(frozen=True)
class GatherCase:
    """Sequences of edge rows, read back as ``dtype``. ``foreign``: some of their pages lie outside the pool."""

    name: str
    layout: CacheLayout | MLALayout
    lengths: tuple[int, ...] = (37, 0, 5, 64)
    dtype: str = "float32"
    kv_dtype: str = "float32"
    foreign: bool = False
    spare_columns: int = 1
    pool: str | None = None
    k_scale: float = 1.0
    v_scale: float = 1.0
    tags: frozenset[str] = frozenset()

    def inputs(self) -> GatherInputs:
        rng, layout = make.generator(self.name), self.layout
        records, lengths = make.records_of(layout), list(self.lengths)
        table, num_pages = make.make_table(rng, layout, lengths, shared_pages=0, spare_pages=2)
        pages = make.poisoned_pool(layout, num_pages, self.pool)
        k, v = (
            np.resize(
                make.edge_tokens(rng, self.kv_dtype, layout.num_kv_heads, dim), (sum(lengths), layout.num_kv_heads, dim)
            )
            for dim in (records.head_dim, records.head_dim_v)
        )
        make.fill_pool(records, pages, table, lengths, k, v, (self.k_scale, self.v_scale))
        page_table = make.pad_table(rng, table, max(map(len, table), default=0) + self.spare_columns)
        if self.foreign:
            page_table[0, 0], page_table[-1, -2] = num_pages, -1
        return GatherInputs(pages, page_table, np.array(lengths, np.int32))


class CopyInputs(NamedTuple):
    pages: np.ndarray
    src: np.ndarray
    dst: np.ndarray


@dataclass(frozen=True)
class CopyCase:
    """Copies between the pages of a pool of random bytes; every third pair has an id outside of it if ``foreign``."""

    name: str
    layout: CacheLayout | MLALayout
    num_pages: int = 9
    num_pairs: int = 4
    foreign: bool = False
    index_dtype: str = "int32"
    pool: str | None = None
    tags: frozenset[str] = frozenset()

    def inputs(self) -> CopyInputs:
        rng = make.generator(self.name)
        pages = make.poisoned_pool(self.layout, self.num_pages, self.pool)
        pages[...] = rng.integers(0, 256, pages.shape, np.uint8)
        ids = rng.permutation(self.num_pages)
        src = rng.choice(ids[self.num_pairs :], self.num_pairs).astype(self.index_dtype)
        dst = ids[: self.num_pairs].astype(self.index_dtype)
        if self.foreign:
            src[::3], dst[1::3] = self.num_pages, -1
        return CopyInputs(pages, src, dst)
