"""Page tables and slots, the same for every framework."""

from __future__ import annotations

import numpy as np

from bench.cases import AppendCase, DecodeCase

_DECODE_TOKENS = 256  # so few come one from each sequence, more are a prompt


def page_table(case: DecodeCase) -> np.ndarray:
    """int32 ``[num_seqs, max_pages]``: the pages of the pool in random order, then -1, which nothing may read."""
    ids = np.random.default_rng(0).permutation(case.num_pages).astype(np.int32)
    table = np.full((len(case.seq_lens), max(case.pages_of) * case.table_factor), -1, np.int32)
    starts = np.cumsum([0, *case.pages_of])
    for row, start, count in zip(table, starts, case.pages_of, strict=False):
        row[:count] = ids[start : start + count]
    return table


def slot_mapping(case: AppendCase) -> tuple[np.ndarray, int]:
    """Slots of the tokens, and the pages of the pool: one token a page for a decoding batch, else pages in full."""
    draw, page_size = np.random.default_rng(0), case.page_size
    if case.num_tokens <= _DECODE_TOKENS:
        pages = draw.permutation(case.num_tokens)
        return pages * page_size + draw.integers(0, page_size, case.num_tokens), case.num_tokens
    pages = draw.permutation(case.num_tokens // page_size)
    return (pages[:, None] * page_size + np.arange(page_size)).reshape(-1), len(pages)
